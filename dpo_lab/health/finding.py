"""The types of run health: a rule, and a finding with its message, values, threshold and suggestion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, ClassVar

from dpo_lab.health.evidence import Evidence


class Severity(str, Enum):
    """How much a finding asks of the reader."""

    info = "info"  # know it when you read the figures
    warning = "warning"  # the run is not what it is taken for


@dataclass(frozen=True)
class Finding:
    """One thing that stands out. says: a sentence with its numbers; threshold: what they were held against; tries: what to
    type or to look at next.
    """

    name: str
    severity: Severity
    says: str
    threshold: str
    tries: str

    @property
    def is_warning(self) -> bool:
        return self.severity is Severity.warning

    def __str__(self) -> str:
        return f"{self.name}: {self.says} ({self.threshold}). Try {self.tries}"

    def as_record(self) -> dict[str, Any]:
        """For a run's record; `from_record` is the way back."""
        return asdict(self) | {"severity": self.severity.value}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Finding:
        return cls(**{**record, "severity": Severity(record["severity"])})


@dataclass(frozen=True)
class Rule:
    """One rule: its fields are its thresholds. Called with the evidence it gives a finding, or none where it is not sure."""

    name: ClassVar[str]

    def __call__(self, run: Evidence) -> Finding | None:
        raise NotImplementedError


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"
