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
from dpo_lab.runs.trajectory import points_of
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.path_at_gain import AT, crossing
from dpo_lab.studies.spec import EXPRESSION, Arm, Study, StudyError

# keys of `evals` that must agree between runs whose metrics are compared
EVAL_SETTINGS_THAT_MUST_MATCH = ("num_prompts", "max_new_tokens", "num_texts", "prompts", "third", "engine", "judge")
FINDINGS = tuple(rule.name.replace(" ", "_") for rule in RULES)  # what may follow `health/` in an expression


class NotMeasured(KeyError):
    """Raised if a run lacks a metric; the message names both."""

    def __str__(self) -> str:
        return str(self.args[0])


class Censored(NotMeasured):
    """Raised if a run's trajectory never came to the value that was asked for; the message says how close it came."""


@dataclass(frozen=True)
class RunData:
    """One run of an arm. status: from its record or its study, or `missing`; record: its run.json, empty if it has
    none; metrics: of a finished run only; is_confirmatory: it started after its study's predictions were registered, or belongs
    to the baseline.
    """

    folder: Path
    arm: str
    seed: int
    status: str = "missing"
    error: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    metrics: Mapping[str, Estimate] = field(default_factory=dict, repr=False)
    is_confirmatory: bool = True
    log: str | None = None

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    def value(self, expression: str) -> float:
        """Return `a`, `a - b` or `a / b`, where a and b are metrics of run.json or: `health/too_easy` (1 if the run's
        record holds that finding, else 0; spaces of its name are underscores), `seconds` and `seconds/dpo` (CPU s),
        `peak_memory_bytes`, `memory/...`, `step_zero_loss`. Or `a at b 0.9`: the metric a where the run's trajectory first
        has 0.9 of b.

        Raises NotMeasured if the run has no such number or is not done, or if a ratio divides by 0; Censored if its
        trajectory never has that value.
        """
        if at := AT.fullmatch(expression):
            return self._on_trajectory(at["metric"], at["name"], float(at["value"]))
        parts = EXPRESSION.fullmatch(expression)
        if parts is None:
            raise NotMeasured(f"{expression}: type one name, or two: a - b, or a / b")
        left, sign, right = parts.groups()
        value = self._named(left)
        if sign:
            other = self._named(right)
            if sign == "/" and other == 0:
                raise NotMeasured(f"{self.title}: {right} is 0, so {expression} is undefined")
            value = value - other if sign == "-" else value / other
        return value

    @property
    def title(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def log_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the metrics log, empty if there is none."""
        path = self.folder / metrics_log.METRICS_LOG
        return list(metrics_log.rows(path)) if path.is_file() else []

    def examples(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """Return the per-example values, kind -> key -> values; empty if the run has none."""
        path = self.folder / EXAMPLES
        return read(path) if path.is_file() else {}

    def candidates(self) -> dict[str, list[float]]:
        """Return gold rewards of the initial policy's candidates by prompt, {key: [K]}; empty if none were sampled."""
        path = self.folder / EXAMPLES
        if not path.is_file():
            return {}
        found = {}
        with path.open() as lines:
            for line in lines:
                if '"candidates"' in line[:40] and (row := json.loads(line))["kind"] == "candidates":
                    found[row["key"]] = row["gold"]
        return found

    def trajectory(self) -> list[dict[str, Any]]:
        """Return the points of the run's trajectory by step, of one that is not done those so far; empty if it has none."""
        recorded = self.record.get("trajectory")
        return points_of(self.log_rows()) if recorded is None and not self.is_done else list(recorded or ())

    def _on_trajectory(self, metric: str, name: str, value: float) -> float:
        found = crossing(self.trajectory(), metric, name, value) if self.is_done else None
        if found is None:
            why = "evals.every is 0" if self.is_done else f"status {self.status}"
            raise NotMeasured(f"{self.title}: no trajectory of {metric} and {name} ({why})")
        if found.is_censored:
            raise Censored(
                f"{self.title}: never came to {name} {value:g}; closest {found.closest:.3g} at step {found.step:g}, with"
                f" {metric} {found.metric:.3g}"
            )
        return found.metric

    def _named(self, name: str) -> float:
        value = self._find(name) if self.is_done else None
        if value is None or not math.isfinite(value):
            why = "" if self.is_done else f"status {self.status}, "
            raise NotMeasured(f"{self.title}: {why}{name} was not measured")
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
    """Runs that are compared: every arm x seed of a study, or all runs of a sweep or a folder.

    record: study.json, or the archived record of a study, otherwise empty; folder: its folder; baseline: the arm that
    others are compared with, or None; baseline_reason: why it is that one, unless a study or the user named it; shared:
    the overrides that all runs have.
    """

    title: str
    folder: Path
    arms: Sequence[Arm]
    seeds: Sequence[int]
    runs: Sequence[RunData]
    baseline: str | None = None
    study: Study | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    baseline_reason: str = ""
    shared: Sequence[str] = ()

    @property
    def is_exploratory(self) -> bool:
        """Return whether runs of a study started before its predictions were registered."""
        return self.study is not None and any(run.is_done and not run.is_confirmatory for run in self.runs)

    @property
    def incomparable_settings(self) -> list[str]:
        """Return a sentence for each evaluation setting that differs between finished runs."""
        sentences = []
        for name in EVAL_SETTINGS_THAT_MUST_MATCH:
            arms: dict[str, list[str]] = {}
            for run in self.runs:
                measured = run.record.get("config", {}).get("evals", {})
                measured = measured | run.record.get("measured_with", {})  # files and policies by what they hold
                if run.is_done and name in measured:
                    arms.setdefault(json.dumps(measured[name], sort_keys=True), []).append(run.arm)
            if len(arms) > 1:
                parts = (f"{value} in {_shorten(dict.fromkeys(names))}" for value, names in arms.items())
                sentences.append(f"evals.{name} is {' and '.join(parts)}")
        return sentences

    def compared_with(self, baseline: str) -> RunSet:
        """Return the runs with another baseline. Raise StudyError if it is no arm."""
        names = [arm.name for arm in self.arms]
        if baseline not in names:
            raise StudyError(f"{baseline}: no such arm in {self.title}; type one of: {'; '.join(names)}")
        return replace(self, baseline=baseline, baseline_reason="")

    def run(self, arm: str, seed: int) -> RunData | None:
        """Return the run of an arm and seed, or None."""
        return next((run for run in self.runs if run.arm == arm and run.seed == seed), None)

    def values(self, arm: str, expression: str) -> dict[int, float]:
        """Return an arm's value for each seed, without runs that are not done or did not measure it."""
        found = {}
        for run in self.runs:
            if run.arm == arm:
                try:
                    found[run.seed] = run.value(expression)
                except NotMeasured:
                    continue
        return dict(sorted(found.items()))

    def members(self, named: str) -> list[Arm]:
        """Return the arm of that name, otherwise the arms of the group of that name."""
        return [arm for arm in self.arms if arm.name == named] or [arm for arm in self.arms if arm.group == named]

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all stages of finished runs; a run shared by several arms counts once."""
        return math.fsum(self.costs().values())

    def cpu_seconds_a_run(self) -> float | None:
        """Return the mean CPU seconds of a finished run, to estimate further ones; None if none is finished."""
        costs = self.costs()
        return math.fsum(costs.values()) / len(costs) if costs else None

    def costs(self) -> dict[Path, float]:
        """Return the CPU seconds of each finished run, by its folder."""
        return {run.folder: run.value("seconds") for run in self.runs if run.is_done and run.record.get("seconds")}


def check_metrics(collections: Sequence[RunSet], metrics: Sequence[str]) -> None:
    """Raise StudyError for a metric that no run has."""
    for metric in metrics:
        if not any(collection.values(arm.name, metric) for collection in collections for arm in collection.arms):
            known = sorted({name for collection in collections for run in collection.runs for name in run.metrics})
            raise StudyError(f"{metric}: no run has it; type some of: {', '.join(known) or 'none, no run is done'}")


def _shorten(names: Iterable[str], at_most: int = 3) -> str:
    first = list(names)
    left = len(first) - at_most
    return ", ".join(first[:at_most]) + (f" and {left} other arms" if left > 0 else "")


def assemble(study: Study, folder: Path, record: Mapping[str, Any], runs: Sequence[RunData]) -> RunSet:
    """Return a study's runs, every arm x seed, each marked by whether it started after the predictions were registered, which
    those of a baseline that is only compared with need not.

    record: holds the `registrations`; the last one of the study's current version counts. A study that adds seeds until it
    is decided has only the runs that it planned: an arm gets no further seed once its predictions are decided.
    """
    digest = study.digest(record.get("stopping"))
    times = [entry["at"] for entry in record.get("registrations") or () if entry["digest"] == digest]
    since = max(map(datetime.fromisoformat, times), default=None)
    found = {(run.arm, run.seed): run for run in runs}
    places = [(arm.name, seed) for arm in study.arms for seed in study.seeds]
    planned = found if runs and record.get("stopping") else places
    jobs = [found.get(place, RunData(folder, *place)) for place in places if place in planned]
    measured = {arm.name for prediction in study.predictions for arm in study.members(prediction.treatment)}
    exempt = {study.baseline} - measured
    marked = [replace(run, is_confirmatory=run.arm in exempt or _is_after(run, since)) for run in jobs]
    return RunSet(study.title, folder, study.arms, study.seeds, marked, study.baseline, study, record)


def _is_after(run: RunData, since: datetime | None) -> bool:
    """Return whether a run started after the predictions were registered; True if it never started."""
    started = run.record.get("started")
    return started is None or (since is not None and datetime.fromisoformat(started) >= since)
