"""The data of runs that are compared: config, metrics and log of each, and the set of arms and seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_lab.health.diagnose import RULES
from dpo_lab.runs import metrics_log
from dpo_lab.runs.examples import EXAMPLES, read
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.spec import EXPRESSION, Arm, Study

# of `evals`: what figures of two runs can't be compared across
EVAL_SETTINGS_THAT_MUST_MATCH = ("samples", "max_new_tokens", "texts", "judge")
FINDINGS = tuple(rule.name.replace(" ", "_") for rule in RULES)  # what `health/` may be followed by


class NotMeasured(KeyError):
    """A run has no such figure; the message names the run and the figure."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RunData:
    """One run of an arm. status: `done`, what its record or its study says, or `missing`; record: its run.json, empty if it
    has none; metrics: only of a run that is done; is_own: it was begun after its study's prediction was registered, or is of
    the baseline.
    """

    folder: Path
    arm: str
    seed: int
    status: str = "missing"
    error: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    metrics: Mapping[str, Estimate] = field(default_factory=dict, repr=False)
    is_own: bool = True
    log: str | None = None

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    def value(self, expression: str) -> float:
        """`a`, `a - b` or `a / b`, of names of run.json's metrics and of: `health/too_easy` (1 if the run's record holds that
        finding, else 0; a name's spaces are underscores), `seconds` and `seconds/dpo` (CPU s), `peak_memory_bytes`,
        `memory/...`, `step_zero_loss`.

        Raises NotMeasured where the run has no such number, is not done, or the ratio is by 0.
        """
        parts = EXPRESSION.fullmatch(expression)
        if parts is None:
            raise NotMeasured(f"{expression}: type one name, or two: a - b, or a / b")
        left, sign, right = parts.groups()
        value = self._named(left)
        if sign:
            other = self._named(right)
            if sign == "/" and other == 0:
                raise NotMeasured(f"{self.title}: {right} is 0, there is no {expression}")
            value = value - other if sign == "-" else value / other
        return value

    @property
    def title(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def journal(self) -> list[dict[str, Any]]:
        """The rows that were logged, none where there is no journal."""
        path = self.folder / metrics_log.METRICS_LOG
        return list(metrics_log.rows(path)) if path.is_file() else []

    def examples(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """What was measured of each example, kind -> key -> values; empty where nothing was kept."""
        path = self.folder / EXAMPLES
        return read(path) if path.is_file() else {}

    def candidates(self) -> dict[str, list[float]]:
        """Gold rewards of the initial policy's candidates by prompt, {key: [K]}; empty where none were sampled."""
        path = self.folder / EXAMPLES
        if not path.is_file():
            return {}
        found = {}
        with path.open() as lines:
            for line in lines:
                if '"candidates"' in line[:40] and (row := json.loads(line))["kind"] == "candidates":
                    found[row["key"]] = row["gold"]
        return found

    def _named(self, name: str) -> float:
        value = self._find(name) if self.is_done else None
        if value is None or not math.isfinite(value):
            why = "not measured" if self.is_done else f"{self.status}, so nothing is known of"
            raise NotMeasured(f"{self.title}: {why} {name}")
        return float(value)

    def _find(self, name: str) -> float | None:
        if name in self.metrics:
            return self.metrics[name].value
        head, _, tail = name.partition("/")
        if head == "health" and tail in FINDINGS and "health" in self.record:
            return float(any(finding["name"].replace(" ", "_") == tail for finding in self.record["health"]))
        if head == "seconds":
            stages = self.record.get("seconds") or {}
            if tail:
                return stages[tail]["cpu"] if tail in stages else None
            return math.fsum(stage["cpu"] for stage in stages.values()) if stages else None
        if head == "memory":
            value = (self.record.get("memory") or {}).get(tail)
            return value if isinstance(value, int | float) else None
        return self.record.get(name) if name in ("peak_memory_bytes", "step_zero_loss") else None


@dataclass(frozen=True)
class RunSet:
    """Runs that are compared: of a study every arm x seed, of a sweep or a tree what lies there.

    record: study.json, or the kept record of a study, else empty; folder: where it lies; baseline: the arm that others are
    compared with, None where there is none.
    """

    title: str
    folder: Path
    arms: Sequence[Arm]
    seeds: Sequence[int]
    runs: Sequence[RunData]
    baseline: str | None = None
    study: Study | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_exploratory(self) -> bool:
        """Whether runs of a study were made before what it predicts was registered."""
        return self.study is not None and any(run.is_done and not run.is_own for run in self.runs)

    @property
    def unlike(self) -> list[str]:
        """Settings by which the runs that are done were not all measured alike, each in a sentence."""
        told = []
        for name in EVAL_SETTINGS_THAT_MUST_MATCH:
            arms: dict[str, list[str]] = {}
            for run in self.runs:
                measured = run.record.get("config", {}).get("evals", {})
                if run.is_done and name in measured:
                    arms.setdefault(json.dumps(measured[name], sort_keys=True), []).append(run.arm)
            if len(arms) > 1:
                parts = (f"{value} in {_some(dict.fromkeys(names))}" for value, names in arms.items())
                told.append(f"evals.{name} is {' and '.join(parts)}")
        return told

    def run(self, arm: str, seed: int) -> RunData | None:
        return next((run for run in self.runs if run.arm == arm and run.seed == seed), None)

    def values(self, arm: str, expression: str) -> dict[int, float]:
        """The figure of each seed of an arm; a run that is not done or did not measure it is absent."""
        found = {}
        for run in self.runs:
            if run.arm == arm:
                try:
                    found[run.seed] = run.value(expression)
                except NotMeasured:
                    continue
        return dict(sorted(found.items()))

    def members(self, named: str) -> list[Arm]:
        """The arm of that name, or else the arms of the group of that name."""
        return [arm for arm in self.arms if arm.name == named] or [arm for arm in self.arms if arm.group == named]

    def cpu_seconds(self) -> float:
        """What the runs that are done took, all stages of all of them; a run that several arms share counts once."""
        return math.fsum(self._costs().values())

    def cpu_seconds_a_run(self) -> float | None:
        """The mean of the same, to say what more of them will take; None where none is done."""
        costs = self._costs()
        return math.fsum(costs.values()) / len(costs) if costs else None

    def _costs(self) -> dict[Path, float]:
        return {run.folder: run.value("seconds") for run in self.runs if run.is_done and run.record.get("seconds")}


def _some(names: Iterable[str], at_most: int = 3) -> str:
    first = list(names)
    left = len(first) - at_most
    return ", ".join(first[:at_most]) + (f" and {left} other arms" if left > 0 else "")


def assemble(study: Study, folder: Path, record: Mapping[str, Any], runs: Sequence[RunData]) -> RunSet:
    """A study's runs, every arm x seed of it, each marked as its own or begun before what it predicts was registered.

    record: holds the `registrations`. Of those of the study as it is now the last one counts.
    """
    stood = [entry["at"] for entry in record.get("registrations") or () if entry["digest"] == study.digest()]
    since = max(map(datetime.fromisoformat, stood), default=None)
    found = {(run.arm, run.seed): run for run in runs}
    cells = [found.get((arm.name, seed), RunData(folder, arm.name, seed)) for arm in study.arms for seed in study.seeds]
    marked = [replace(run, is_own=run.arm == study.baseline or _is_after(run, since)) for run in cells]
    return RunSet(study.title, folder, study.arms, study.seeds, marked, study.baseline, study, record)


def _is_after(run: RunData, since: datetime | None) -> bool:
    """Whether a run was begun once the prediction stood; true of one that never began."""
    started = run.record.get("started")
    return started is None or (since is not None and datetime.fromisoformat(started) >= since)
