"""Lightning's way into the run's journal: a logger that can be rewound to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lab.results import journal


class Journal(Logger):
    """Writes metrics.jsonl in `save_dir`, on rank 0. The file holds what the run's record and reports are made of."""

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / journal.JOURNAL

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
        journal.append(self.path, step or 0, {name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's record holds the config."""

    @rank_zero_only
    def rewind(self, to: int) -> None:
        journal.rewind(self.path, to)
