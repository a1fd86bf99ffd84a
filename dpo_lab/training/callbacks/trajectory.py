"""The trajectory callback: measures the policy every so many steps, and logs each point once, also if a run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, Trainer

from dpo_lab.evals.trajectory import TrajectoryMeter
from dpo_lab.models.policy import Policy
from dpo_lab.runs.trajectory import GROUP, text_of
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.throughput import throughput_callback

log = logging.getLogger("dpo_lab")


class Trajectory(Callback):
    """Measures the policy at step 0 and after every `every` optimizer steps, and logs it to all loggers.

    A point is measured when the step after it is about to start. So its row in the metrics log lies behind the position
    that the checkpoint of its step records: a run that resumes from that checkpoint measures the point, one that resumes
    from a later one does not. timed: the context of a measurement, which counts its seconds.
    """

    def __init__(self, meter: TrajectoryMeter, every: int, timed: Callable[[], AbstractContextManager[Any]]) -> None:
        self.meter, self.every, self.timed = meter, every, timed

    def on_train_batch_start(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every:
            return
        throughput = throughput_callback(trainer)
        with throughput.paused() if throughput is not None else nullcontext(), self.timed():
            policy = Policy(pl_module.model, self.meter.context.initial.tokenizer)
            self.log_point(trainer, step, self.meter.measure(policy) if step else self.meter.first)

    def log_point(self, trainer: Trainer, step: int, point: Mapping[str, float]) -> None:
        """Log a point to all loggers and to the terminal."""
        log.info("step %d: %s", step, text_of(point))
        for logger in trainer.loggers:
            logger.log_metrics({GROUP + name: value for name, value in point.items()}, step=step)
