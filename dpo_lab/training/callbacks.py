"""Callbacks of our own: the bar on the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lab.results.progress import track
from dpo_lab.training.step import StepModule


class StepBar(Callback):
    """Optimizer steps done of max_steps, with the newest loss and, of pairs, margin and accuracy; on rank 0."""

    FIGURES = {"train/loss": "loss", "train/rewards/margins": "margin", "train/rewards/accuracies": "accuracy"}

    def on_train_start(self, trainer: Trainer, pl_module: StepModule) -> None:
        self.stack, self.steps_shown = ExitStack(), trainer.global_step
        if trainer.is_global_zero:
            self.advance = self.stack.enter_context(track(pl_module.title, trainer.max_steps))
            self.advance(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step > self.steps_shown:
            seen = trainer.callback_metrics
            figures = "  ".join(f"{short} {seen[name]:.3f}" for name, short in self.FIGURES.items() if name in seen)
            self.advance(trainer.global_step - self.steps_shown, figures)
            self.steps_shown = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
