"""The logger of the run's own metrics log, which can be truncated to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lab.runs import metrics_log


class JSONLLogger(Logger):
    """Writes metrics.jsonl in `save_dir`, on rank 0: the same values at the same steps as the other loggers."""

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / metrics_log.METRICS_LOG

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metrics_log.append(self.path, step or 0, {name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run record holds the config."""

    @rank_zero_only
    def truncate(self, size: int) -> None:
        """Truncate the metrics log to `size` bytes."""
        metrics_log.truncate(self.path, size)
