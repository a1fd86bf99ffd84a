"""Diagnose a run from its record and metrics log, while it trains and afterwards.

Usage: python -m dpo_lab.health.diagnose outputs/dpo/default/seed=0      one run folder or several
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lab.errors import LabError
from dpo_lab.health.evidence import Evidence
from dpo_lab.health.finding import Finding, Rule
from dpo_lab.health.judge_rules import LengthBias, PositionBias, Unanswered
from dpo_lab.health.outcome_rules import (
    Degenerated,
    Displacement,
    LengthHacking,
    NothingHeldOut,
    RewardAtChance,
    RoundedAway,
)
from dpo_lab.health.rollout_rules import ClippedRatios, EntropyCollapse, IdleCritic, OverOptimised, RunawayKL
from dpo_lab.health.training_rules import Diverging, Memorised, NotLearning, OverFitting, StepZero, TooEasy
from dpo_lab.runs import metrics_log, run_record

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "health: no findings"

RULES: tuple[Rule, ...] = (
    NothingHeldOut(),
    StepZero(off=0.1),
    NotLearning(moved=0.01, right=0.56, after=0.5),
    TooEasy(right=0.99, early=0.25),
    Diverging(rise=0.5),
    OverFitting(rise=0.05, gap=0.15),
    Memorised(right=0.6),
    OverOptimised(fall=0.2),
    RunawayKL(nats=30.0),
    EntropyCollapse(left=0.2),
    ClippedRatios(most=0.3),
    IdleCritic(least=0.05),
    Displacement(share=0.1, nats=2.0),
    LengthHacking(longer=1.2, shorter=0.8),
    Degenerated(perplexity=1.5, well_formed=0.2, stopped=0.1, distinct=0.5),
    RoundedAway(moved=0.5),
    RewardAtChance(chance=0.5),
    PositionBias(most=0.15),
    LengthBias(apart=0.05),
    Unanswered(most=0.05),
)


def findings(record: Mapping[str, Any], rows: Iterable[Mapping[str, float]]) -> list[Finding]:
    """Return what the rules find in a run so far, warnings first. record, rows: see Evidence."""
    run = Evidence(record, rows)
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    return sorted(found, key=lambda finding: not finding.is_warning)


def of_folder(folder: Path, record: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of a run from its record and the metrics log in its folder."""
    path = folder / metrics_log.METRICS_LOG
    return findings(record, metrics_log.rows(path) if path.exists() else ())


def lines(found: Sequence[Finding]) -> Iterator[str]:
    """Yield one line per finding for the terminal, or the line that there is none."""
    for finding in found:
        yield f"health, {finding.severity.value}: {finding}"
    if not found:
        yield NOTHING


def print_health(console: Console, found: Sequence[Finding]) -> None:
    """Print the findings, the last part of a run's summary."""
    for line in lines(found):
        console.print(line, soft_wrap=True)


def main(folders: Sequence[str]) -> int:
    """Print the findings of every run folder; return the exit code, 2 if a folder holds no run that can be read."""
    for folder in map(Path, folders):
        try:
            record = run_record.read_record(folder)
            if record is None:
                raise LabError(f"{folder}: holds no run; type the folder that contains {run_record.RECORD}")
            found = of_folder(folder, record)
        except LabError as error:
            print(error, file=sys.stderr)
            return 2
        print(folder)
        for line in lines(found):
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
