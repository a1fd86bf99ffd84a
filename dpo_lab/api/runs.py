"""Runs that are compared: a table with a row for each, effects paired by seed, and the verdicts of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from dpo_lab.api.run import Run
from dpo_lab.errors import LabError
from dpo_lab.reporting import comparison
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies import grouping, load, verdicts
from dpo_lab.studies.run_data import RunSet, check_metrics
from dpo_lab.studies.scales import as_told

if TYPE_CHECKING:
    from pandas import DataFrame


class Runs(Sequence[Run]):
    """A sequence of runs, grouped into arms: runs whose settings differ in nothing but seeds are one arm."""

    def __init__(self, collection: RunSet) -> None:
        self._collection = collection
        self._runs = [Run(data) for data in collection.runs]

    @property
    def arms(self) -> list[str]:
        """The names of the arms: the settings in which they differ."""
        return [arm.name for arm in self._collection.arms]

    @property
    def baseline(self) -> str | None:
        """The arm that others are compared with by default: a study's, or the one without an intervention."""
        return self._collection.baseline

    def table(self, metrics: Sequence[str] = (), intervals: bool = False) -> DataFrame:
        """Return a row for each run: `arm`, the settings that vary, `seed`, `status`, the metrics, and `folder`.

        metrics: names in run.json, all of them by default, or expressions of two, `gold_gain / kl`. intervals: add columns
        `NAME_low` and `NAME_high`, the 95 % interval within the run, for metrics that have one.
        """
        from pandas import DataFrame

        runs = self._collection.runs
        settings = [grouping.settings(run.record["config"]) if "config" in run.record else {} for run in runs]
        varying = grouping.varying_columns(settings)
        names = list(metrics) or list(dict.fromkeys(name for run in runs for name in run.metrics))
        rows = []
        for number, run in enumerate(runs):
            row: dict[str, Any] = {"arm": run.arm, **{key: column[number] for key, column in varying.items()}}
            row |= {"seed": run.seed, "status": run.status}
            for name in names:
                row[name] = self._collection.values(run.arm, name).get(run.seed)
                if intervals and name in run.metrics:
                    row |= _interval(run.metrics[name], f"{name}_")
            rows.append(row | {"folder": str(run.folder)})
        return DataFrame(rows)

    def compare(self, baseline: str | None = None, metrics: Sequence[str] = ()) -> DataFrame:
        """Return the effects of the report: a row for each metric and arm.

        Columns: `metric`, `arm`, `n` (seeds), `value`, `low`, `high` (the mean over seeds and its 95 % interval),
        `difference`, `difference_low`, `difference_high` (to the baseline, paired by seed; a factor where `scale` is log,
        as for KL), `p_holm`, the p of that difference, Holm-corrected over arms, and `scale`. baseline: the name of an arm,
        by default `Runs.baseline`; metrics: by default those of the study, otherwise the usual ones.

        Raises LabError for an arm or a metric that no run has.
        """
        from pandas import DataFrame

        collection = self._collection.compared_with(baseline) if baseline is not None else self._collection
        check_metrics([collection], metrics)
        rows = []
        for metric, measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).items():
            for each in measured:
                row: dict[str, Any] = {"metric": metric, "arm": each.arm, "n": each.n}
                row |= _estimate(each.estimate, "value", "") | _estimate(each.difference, "difference", "difference_")
                rows.append(row | {"p_holm": each.p, "scale": each.scale.value})
        return DataFrame(rows)

    def verdicts(self) -> DataFrame:
        """Return the verdicts of a study, a row for each prediction: `claim`, `verdict`, `effect`, `low`, `high`,
        `p_holm`, `note`, `scale` (the effect is a factor if it is log or log_odds), `interval_kind`.

        Raises LabError if the runs belong to no study.
        """
        from pandas import DataFrame

        if self._collection.study is None:
            raise LabError(
                f"{self._collection.title}: not a study, so it has no predictions; type load_runs(its folder)"
            )
        rows = []
        for prediction, verdict in verdicts.decide(self._collection):
            row: dict[str, Any] = {"claim": prediction.description, "verdict": verdict.word}
            effect = as_told(prediction.scale, verdict.effect) if verdict.effect else None
            row |= _estimate(effect, "effect", "") | {"p_holm": verdict.p_holm, "note": verdict.note}
            rows.append(row | {"scale": prediction.scale.value, "interval_kind": verdict.interval_kind})
        return DataFrame(rows)

    def run(self, arm: str, seed: int = 0) -> Run:
        """Return the run of an arm and a seed. Raise LabError if there is none."""
        if (data := self._collection.run(arm, seed)) is None:
            raise LabError(f"{arm}, seed {seed}: no such run; type one of the arms {'; '.join(self.arms)}")
        return Run(data)

    @overload
    def __getitem__(self, at: int) -> Run: ...
    @overload
    def __getitem__(self, at: slice) -> list[Run]: ...
    def __getitem__(self, at: int | slice) -> Run | list[Run]:
        return self._runs[at]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"<Runs of {self._collection.title}: {len(self)} runs, arms {'; '.join(self.arms)}>"


def load_runs(*paths: str | Path) -> Runs:
    """Load the runs below folders: of runs, of a sweep, of a study; or the archived record of a study (.json).

    Raises LabError if there is no run, or if a folder holds several studies.
    """
    found = load.gather([Path(path) for path in paths])
    if len(found) != 1:
        names = ", ".join(str(each.folder) for each in found) or "nothing"
        raise LabError(f"load_runs: {names} are not compared with each other; type the folder of one of them")
    return Runs(found[0])


def runs_of_sweep(folder: Path) -> Runs:
    """Return the runs of the last sweep in a folder, those of its sweep.json."""
    return Runs(load.sweep(folder))


def _interval(estimate: Estimate | None, prefix: str) -> Mapping[str, float | None]:
    low, high = (estimate.interval if estimate else None) or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _estimate(estimate: Estimate | None, name: str, prefix: str) -> dict[str, float | None]:
    return {name: estimate.value if estimate else None, **_interval(estimate, prefix)}
