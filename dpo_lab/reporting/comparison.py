"""The numbers of a comparison: per arm each metric, its interval and its difference to the baseline; and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lab.reporting.formatting import format_value, signed
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.stats.text import format_estimate
from dpo_lab.studies import verdicts
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import Scale, as_told, factor, prefix
from dpo_lab.studies.spec import Direction, Measure, Prediction

# The metrics shown for runs that belong to no study, in this order, as far as they were measured.
USUAL = ("true_accuracy", "accuracy", "gold_gain", "judge_gain", "kl", "well_formed", "perplexity", "loss")
MOST = 6  # metrics shown by default


@dataclass(frozen=True)
class Measured:
    """One metric of one arm. estimate: over seeds, None if no run has it; difference: to the baseline, paired by seed, a
    factor if scale is log; p: of that difference, Holm-corrected over arms; planned: runs that the arm should have.
    """

    arm: str
    metric: str
    estimate: Estimate | None
    difference: Estimate | None
    p: float | None
    scale: Scale
    planned: int

    @property
    def n(self) -> int:
        return (self.estimate.n or 0) if self.estimate else 0


def metrics_of(collection: RunSet, asked: Sequence[str] = ()) -> list[str]:
    """Return the requested metrics, otherwise the study's, otherwise the usual ones that some run has."""
    if asked:
        return list(asked)
    if collection.study:
        return list(collection.study.metrics)
    labelled = [name for run in collection.runs for name in run.record.get("metric_labels", ())]
    measured = [
        name for name in dict.fromkeys((*USUAL, *labelled)) if any(name in run.metrics for run in collection.runs)
    ]
    return measured[:MOST]


def figures(collection: RunSet, metrics: Sequence[str]) -> dict[str, list[Measured]]:
    """Return what was measured, by metric, for every arm in order."""
    planned = {arm.name: sum(run.arm == arm.name for run in collection.runs) for arm in collection.arms}
    found = {}
    for metric in metrics:
        versus = verdicts.versus_baseline(collection, metric)
        found[metric] = [
            Measured(arm.name, metric, *versus.get(arm.name, (None, None, None, Scale.plain)), planned[arm.name])
            for arm in collection.arms
        ]
    return found


def baseline_text(collection: RunSet) -> str:
    """Return which arm is the baseline and why, or what to type for one."""
    if collection.baseline is None:
        return "none; type --baseline ARM"
    reason = collection.baseline_reason
    return f"{collection.baseline} ({reason}; type --baseline ARM for another)" if reason else collection.baseline


def interval_text(estimate: Estimate, spell=format_value) -> str:
    """Return a value with its interval, `0.52 (0.37 .. 0.67)`; the value alone if it has no interval."""
    return format_estimate(estimate, spell)


def with_error(estimate: Estimate, spell=format_value) -> str:
    """Return a value with its error, `0.52 ±0.15`, or with an asymmetric interval; the value alone if it has none."""
    low, high = estimate.interval or (0.0, 0.0)
    if low == high:
        return spell(estimate.value)
    half = (high - low) / 2
    if abs((low + high) / 2 - estimate.value) > 1e-6 * max(half, 1e-12):
        return interval_text(estimate, spell)
    return f"{spell(estimate.value)} ±{format_value(half)}"


def effect_text(effect: Estimate, scale: Scale, spell: Callable[[Estimate, Callable], str] = interval_text) -> str:
    """Return an effect on a scale as text: `+0.52 (0.37 .. 0.67)`, or a factor, `x 0.24 (0.17 .. 0.34)`."""
    return prefix(scale) + spell(as_told(scale, effect), signed if scale is Scale.plain else format_value)


def effect_name(prediction: Prediction) -> str:
    """Return what an effect was computed from, `kl: uniform minus dpo`."""
    other = prediction.control or f"{prediction.value:g}"
    about = {
        Measure.level: f"{prediction.metric} of {prediction.treatment}"
        + (f" minus {prediction.value:g}" if prediction.value else ""),
        Measure.difference: f"{prediction.metric}: {prediction.treatment} minus {prediction.control}",
        Measure.slope: f"slope of {prediction.metric} along {prediction.axis}, {prediction.treatment}",
        Measure.area: f"share of the optimum's area: {prediction.treatment} minus {other}",
    }[prediction.measure]
    fixed = ", ".join(f"{name} = {value:g}" for name, value in prediction.matched_on.items())
    return f"{about}, at {fixed}" if fixed else about


def predicted(prediction: Prediction) -> str:
    """Return the prediction for an effect, `above 0; smallest relevant effect 0.2`."""
    least, mark = prediction.min_effect, prefix(prediction.scale)
    if mark:
        none, least = f"{mark}1", factor((-1 if prediction.direction is Direction.less else 1) * prediction.least)
    else:
        none = "0"
    if prediction.direction is Direction.same:
        return f"within {mark}{1 / least:.3g} .. {least:.3g}" if mark else f"within {least:g} of 0"
    where = f"above {none}" if prediction.direction is Direction.more else f"below {none}"
    return f"{where}; smallest relevant effect {mark}{least:.3g}" if prediction.min_effect else where


def detectable_text(prediction: Prediction, verdict: Verdict, spell: Callable[[float], str] = format_value) -> str:
    """Return the effect that the seeds of a verdict could have detected; empty if it is unknown."""
    if verdict.detectable is None:
        return ""
    if prediction.scale is Scale.plain:
        return spell(verdict.detectable)
    return prefix(prediction.scale) + spell(factor(verdict.detectable))


def verdict_notes(verdict: Verdict) -> list[str]:
    """Return the notes on what limits a verdict."""
    missing = [f"seed {seed}: {why}" for seed, why in sorted(verdict.missing.items())]
    if len(missing) > 3:
        missing[2:] = [f"and {len(missing) - 2} more seeds"]
    return [*([verdict.note] if verdict.note else []), *missing]


def registered(record: Mapping[str, Any], digest: str) -> tuple[str | None, int]:
    """Return when the current prediction was last registered, and how many other versions were registered."""
    entries = record.get("registrations", ())
    own = [str(entry["at"]) for entry in entries if entry["digest"] == digest]
    return (max(own) if own else None), len({entry["digest"] for entry in entries} - {digest})


def difference_text(figure: Measured) -> str:
    """Return the difference to the baseline, or the factor, with its interval; empty if there is none."""
    return told_difference(figure, interval_text) if figure.difference else ""


def told_difference(figure: Measured, spell: Callable[[Estimate, Callable], str]) -> str:
    """Return the difference to the baseline as `spell` writes it, a factor after `x `."""
    assert figure.difference is not None
    return prefix(figure.scale) + spell(figure.difference, signed if figure.scale is Scale.plain else format_value)


def count_text(figure: Measured) -> str:
    """Return the number of runs as text: `3`, or `2/3` if runs are missing."""
    return str(figure.n) if figure.n == figure.planned else f"{figure.n}/{figure.planned}"
