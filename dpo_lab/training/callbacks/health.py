"""The health callback: reports a finding once, as soon as it is certain, in the log and in TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dpo_lab.health.diagnose import NOTHING, findings, of_folder
from dpo_lab.health.finding import Finding
from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.runs import metrics_log, run_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.training.loggers.jsonl import JSONLLogger

log = logging.getLogger("dpo_lab")

LIVE, FINAL = "health/live", "health"  # tags in TensorBoard


class Health(Callback):
    """Diagnoses the run from its record and metrics log, on rank 0, whenever metrics were logged.

    Reported findings are in the checkpoint: a resumed run does not report them again, but adds those to TensorBoard
    again that were removed there because they are from later steps than the checkpoint.
    """

    def __init__(self) -> None:
        self.reported: dict[str, list[Any]] = {}  # name -> [step, record of the finding]
        self.rows: list[dict[str, Any]] = []
        self.read = 0  # bytes read of the metrics log

    def state_dict(self) -> dict[str, Any]:
        return {"said": dict(self.reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reported = dict(state_dict["said"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for step, finding in self.reported.values():
            if step >= trainer.global_step:
                show(trainer, [Finding.from_record(finding)], LIVE, step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self._diagnose(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._diagnose(trainer)

    def _diagnose(self, trainer: Trainer) -> None:
        paths = [logger.path for logger in trainer.loggers if isinstance(logger, JSONLLogger)]
        record = run_record.read_record(Path(trainer.default_root_dir)) if trainer.is_global_zero and paths else None
        if record is None or not paths[0].exists():
            return
        end = metrics_log.position(paths[0])
        self.rows += metrics_log.rows(paths[0], self.read)
        self.read = end
        for finding in findings(record, self.rows):
            if finding.name not in self.reported:
                self.reported[finding.name] = [trainer.global_step, finding.as_record()]
                log.log(logging.WARNING if finding.is_warning else logging.INFO, "health: %s", finding)
                show(trainer, [finding], LIVE, trainer.global_step)


def show(trainer: Trainer, found: Sequence[Finding], tag: str, step: int) -> None:
    """Add findings to TensorBoard as a text table, if TensorBoard is among the loggers; on rank 0."""
    head = ("", "finding", "message", "threshold", "suggestion")
    rows = [(f.severity.value, f.name, f.message, f.threshold, f.suggestion) for f in found]
    text = "\n".join(markdown_table(head, rows)) if rows else NOTHING
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)


def final_findings(run: run_record.Run, trainer: Trainer, metrics: Mapping[str, Estimate]) -> list[Finding]:
    """Return the findings at the end of a run and add them to TensorBoard."""
    record = run.record | {"metrics": {name: estimate.as_record() for name, estimate in metrics.items()}}
    found = of_folder(run.folder, record)
    show(trainer, found, FINAL, trainer.global_step)
    return found
