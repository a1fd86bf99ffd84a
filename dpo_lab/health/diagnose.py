"""Diagnose a run from its record and metrics log, while it trains and afterwards.

python -m dpo_lab.health.diagnose outputs/dpo/default/seed=0      of a run folder, or of several
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lab.health.evidence import Evidence
from dpo_lab.health.finding import Finding, Rule
from dpo_lab.health.outcome_rules import Degenerated, Displacement, LengthHacking, NothingHeldOut, RoundedAway
from dpo_lab.health.training_rules import Diverging, Memorised, NotLearning, OverFitting, StepZero, TooEasy
from dpo_lab.runs import metrics_log, run_record

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "health: nothing stands out"

RULES: tuple[Rule, ...] = (
    NothingHeldOut(),
    StepZero(off=0.1),
    NotLearning(moved=0.01, right=0.56, after=0.5),
    TooEasy(right=0.99, early=0.25),
    Diverging(rise=0.5),
    OverFitting(rise=0.05, gap=0.15),
    Memorised(right=0.6),
    Displacement(share=0.1, nats=2.0),
    LengthHacking(longer=1.2, shorter=0.8),
    Degenerated(perplexity=1.5, well_formed=0.2, stopped=0.1, distinct=0.5),
    RoundedAway(moved=0.5),
)


def findings(record: Mapping[str, Any], rows: Iterable[Mapping[str, float]]) -> list[Finding]:
    """What stands out in a run so far, warnings first. record, rows: see Evidence."""
    run = Evidence(record, rows)
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    return sorted(found, key=lambda finding: not finding.is_warning)


def of_folder(folder: Path, record: Mapping[str, Any]) -> list[Finding]:
    """The same from the journal in a run's folder."""
    path = folder / metrics_log.METRICS_LOG
    return findings(record, metrics_log.rows(path) if path.exists() else ())


def lines(found: Sequence[Finding]) -> Iterator[str]:
    """For the terminal: one line a finding, or that there is none."""
    for finding in found:
        yield f"health, {finding.severity.value}: {finding}"
    if not found:
        yield NOTHING


def print_health(console: Console, found: Sequence[Finding]) -> None:
    """The end of a run's closing summary."""
    for line in lines(found):
        console.print(line, soft_wrap=True)


def main(folders: Sequence[str]) -> int:
    """Say it of every run folder; 2 where one is none."""
    for folder in map(Path, folders):
        record = run_record.read_record(folder)
        if record is None:
            print(f"{folder}: no run lies here; type the folder that holds its {run_record.RECORD}", file=sys.stderr)
            return 2
        print(folder)
        for line in lines(of_folder(folder, record)):
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
