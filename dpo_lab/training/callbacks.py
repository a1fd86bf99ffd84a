"""Callbacks of our own: the bar on the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lab.results.progress import Advance, track
from dpo_lab.training.cost import cost_of
from dpo_lab.training.step import StepModule


class StepBar(Callback):
    """Optimizer steps done of max_steps with the newest training figures and tokens a second, on rank 0."""

    FIGURES = {"train/loss": "loss", "train/rewards/accuracies": "acc", "train/rewards/margins": "margin"}
    advance: Advance | None = None

    def __init__(self) -> None:
        self.stack, self.steps_shown = ExitStack(), 0

    def on_train_start(self, trainer: Trainer, pl_module: StepModule) -> None:
        self.steps_shown = trainer.global_step
        if trainer.is_global_zero:
            stage = track(pl_module.title, trainer.max_steps, done=trainer.global_step)
            self.advance = self.stack.enter_context(stage)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.advance is not None and trainer.global_step > self.steps_shown:
            self.advance(trainer.global_step - self.steps_shown, self._figures(trainer))
            self.steps_shown = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.advance is not None:
            self.advance(0, ["validating"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.advance is not None:
            self.advance(0, self._figures(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stack.close()
        self.advance = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stack.__exit__(type(exception), exception, exception.__traceback__)

    def _figures(self, trainer: Trainer) -> list[str]:
        """The most wanted first: a narrow terminal shows no more than fit."""
        seen, cost = trainer.callback_metrics, cost_of(trainer)
        figures = [f"{short} {seen[name]:.3f}" for name, short in self.FIGURES.items() if name in seen]
        if cost is not None and cost.tokens_per_second:  # every rank's part of a step is about as large
            figures.insert(2, f"{trainer.world_size * cost.tokens_per_second:,.0f} tok/s")
        return figures
