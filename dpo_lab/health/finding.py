"""The types of run health: a rule, and a finding with its message, values, threshold and suggestion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, ClassVar

from dpo_lab.health.evidence import Evidence


class Severity(str, Enum):
    """How serious a finding is."""

    info = "info"  # worth knowing when reading the metrics
    warning = "warning"  # the run does not show what it seems to show


@dataclass(frozen=True)
class Finding:
    """One problem that a rule found. message: with its numbers; threshold: the limits they were compared with;
    suggestion: what to type or to look at next.
    """

    name: str
    severity: Severity
    message: str
    threshold: str
    suggestion: str

    @property
    def is_warning(self) -> bool:
        return self.severity is Severity.warning

    def __str__(self) -> str:
        return f"{self.name}: {self.message} (threshold: {self.threshold}). Try {self.suggestion}"

    def as_record(self) -> dict[str, Any]:
        """Return the finding as it is stored in a run's record; `from_record` reads it back."""
        return asdict(self) | {"severity": self.severity.value}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Finding:
        return cls(**{**record, "severity": Severity(record["severity"])})


@dataclass(frozen=True)
class Rule:
    """A health rule, whose fields are its thresholds. Called with the evidence, it returns a finding, or None if not
    sure.
    """

    name: ClassVar[str]

    def __call__(self, run: Evidence) -> Finding | None:
        raise NotImplementedError
