"""Callbacks of our own, one concern each: the bar on the terminal, the run's row in TensorBoard's HPARAMS table."""

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its classes at import)

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

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


class HParams(Callback):
    """One row per run in HPARAMS, with real columns, the run's last scalars as its metrics, and failures as failures.

    Only the session's start and end are written, no experiment summary: TensorBoard then takes its columns from all runs
    instead of from the first.
    """

    def __init__(self, hparams: dict[str, Any]) -> None:
        self.hparams = hparams

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in self.hparams.items():
            if isinstance(value, bool):  # before numbers: a bool is an int
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._write(trainer, metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "STATUS_SUCCESS")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, "STATUS_FAILURE")

    def _end(self, trainer: Trainer, status: str) -> None:
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status), end_time_secs=time.time())
        self._write(trainer, metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def _write(self, trainer: Trainer, tag: str, **content: Any) -> None:
        if not trainer.is_global_zero:
            return
        data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment._get_file_writer()
                writer.add_summary(Summary(value=[value]))
                writer.flush()
