"""The progress bar callback."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from dpo_lab.distributed.signals import TIME_IS_UP
from dpo_lab.terminal.progress import Advance, track
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.throughput import throughput_callback

log = logging.getLogger("dpo_lab")


class TimeLimit(Callback):
    """Stops training after `max_time` as SIGTERM does: the current step is finished and saved, and the run can be
    resumed.

    Each attempt of a run has the full time and trains at least one step. The time is not checked before the last step.
    """

    def __init__(self, max_time: Any) -> None:
        self.max_time = max_time
        try:
            self.timer = Timer(max_time)
        except (MisconfigurationException, TypeError, AttributeError) as error:
            raise MisconfigurationException(
                f"trainer.max_time={max_time}: must be days:hours:minutes:seconds; type e.g. +trainer.max_time=00:12:00:00"
            ) from error

    def on_train_start(self, trainer: Trainer, pl_module: BaseModule) -> None:
        self.timer.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        step, left = trainer.global_step + 1, self.timer.time_remaining()
        request = pl_module.request
        if (
            left is not None
            and left <= 0
            and step < trainer.max_steps
            and request is not None
            and request.signum is None
        ):
            request.ask(TIME_IS_UP)
            if trainer.is_global_zero:
                log.warning(
                    "trainer.max_time=%s is over: stopping at step %d of %d; type the same command again to resume"
                    " from there",
                    self.max_time,
                    step,
                    trainer.max_steps,
                )


class ProgressBar(Callback):
    """A progress bar of optimizer steps with the latest training metrics and tokens per second, on rank 0."""

    METRICS = {
        "train/loss": "loss",
        "train/rollout/reward": "reward",
        "train/rollout/kl": "kl",
        "train/rewards/accuracies": "acc",
        "train/rewards/margins": "margin",
    }
    advance: Advance | None = None

    def __init__(self) -> None:
        self.stack, self.steps_shown = ExitStack(), 0

    def on_train_start(self, trainer: Trainer, pl_module: BaseModule) -> None:
        self.steps_shown = trainer.global_step
        if trainer.is_global_zero:
            stage = track(pl_module.title, trainer.max_steps, done=trainer.global_step)
            self.advance = self.stack.enter_context(stage)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.advance is not None and trainer.global_step > self.steps_shown:
            self.advance(trainer.global_step - self.steps_shown, self._texts(trainer))
            self.steps_shown = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.advance is not None:
            self.advance(0, ["validating"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.advance is not None:
            self.advance(0, self._texts(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stack.close()
        self.advance = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stack.__exit__(type(exception), exception, exception.__traceback__)

    def _texts(self, trainer: Trainer) -> list[str]:
        """Return the texts beside the bar, the most important first: a narrow terminal shows only those that fit."""
        metrics, throughput = trainer.callback_metrics, throughput_callback(trainer)
        texts = [f"{short} {metrics[name]:.3f}" for name, short in self.METRICS.items() if name in metrics]
        if throughput is not None and throughput.tokens_per_second:  # estimated: ranks have parts of about equal size
            texts.insert(2, f"{trainer.world_size * throughput.tokens_per_second:,.0f} tok/s")
        return texts
