"""The config of an inspection: that of a run, with what to show and what to export."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hydra.core.config_store import ConfigStore

from dpo_lab.config.schema import RunConfig


class Split(str, Enum):
    """The split whose pairs are exported."""

    train = "train"
    held_out = "held_out"


@dataclass
class InspectConfig(RunConfig):
    """The settings of an inspection. show: pairs to print token by token; page: an .html or .png file to write; export: a
    .parquet or .jsonl file to write the pairs of export_split to, with export_tokens also their token ids.
    """

    show: int = 3
    page: str | None = None
    export: str | None = None
    export_split: Split = Split.train
    export_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0:
            raise ValueError(f"show={self.show}: must be 0 or more; type e.g. show=3")
        if self.page is not None and Path(self.page).suffix not in (".html", ".png"):
            raise ValueError(f"page={self.page}: must end in .html or .png; type e.g. page=report.html")
        if self.export is not None and Path(self.export).suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"export={self.export}: must end in .parquet or .jsonl; type e.g. export=pairs.parquet")


def register() -> None:
    """Register the schema with Hydra."""
    ConfigStore.instance().store(name="inspect", group="schema", node=InspectConfig)
