"""Verdicts: a prediction's effect over all seeds, and what it says of the prediction.

A prediction is *supported* if the effect has the predicted sign, is at least as large as `at_least`, and its
Holm-corrected p is below 5 %; *not supported* if the 95 % interval excludes every effect of that size; otherwise
*inconclusive*. `same` is supported if the interval lies within plus or minus `at_least`, not supported if it lies
outside. Seeds are paired: an effect is a difference between runs of one seed, and n is the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict
from dpo_lab.studies.effects import check, describe, effect_per_seed
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Direction, Measure, Prediction

__all__ = [
    "arms_of",
    "by_prompt",
    "check",
    "decide",
    "describe",
    "effect_per_seed",
    "mean_over_seeds",
    "study_verdict",
    "versus_baseline",
]

COUNTED = "memory/"  # metrics counted in bytes: exact, the same in every seed
OVER = ("done", "failed", "unreadable")  # run statuses that will not change without a new start


def decide(collection: RunSet) -> list[tuple[Prediction, Verdict]]:
    """Return a verdict for every prediction of a study. Raises ValueError if the runs belong to no study.

    p values of primary predictions are Holm-corrected over the primary predictions, those of the others over all
    predictions. A verdict stays inconclusive until all its runs have ended: stopping early when the result pleases is
    no test.
    """
    if collection.study is None:
        raise ValueError(f"{collection.title}: not a study, so it has no predictions")
    predictions = collection.study.predictions
    found = [_measured(prediction, collection) for prediction in predictions]
    every = range(len(predictions))
    adjusted: dict[int, tuple[float | None, int]] = {}
    for family in (every, [number for number in every if predictions[number].primary]):
        tests = [number for number in family if predictions[number].direction is not Direction.same]
        ps = {number: p for number in tests if (p := found[number].p) is not None}
        adjusted |= {number: (None, len(tests)) for number in family}
        adjusted |= {number: (p, len(tests)) for number, p in zip(ps, paired_tests.holm([*ps.values()]), strict=True)}
    return [
        (
            prediction,
            _with_word(prediction, verdict, *adjusted[number], _unfinished_seeds(prediction, verdict, collection)),
        )
        for number, (prediction, verdict) in enumerate(zip(predictions, found, strict=True))
    ]


def study_verdict(judged: Sequence[tuple[Prediction, Verdict]]) -> str:
    """Return a study's verdict: supported if all primary predictions are, not supported if one is not, else
    inconclusive.
    """
    words = [verdict.word for prediction, verdict in judged if prediction.primary]
    if NOT_SUPPORTED in words:
        return NOT_SUPPORTED
    return SUPPORTED if words and set(words) == {SUPPORTED} else INCONCLUSIVE


def versus_baseline(collection: RunSet, metric: str) -> dict[str, tuple[Estimate, Estimate | None, float | None]]:
    """Return, for each arm that measured the metric: its mean over seeds; the difference to the baseline, paired by
    seed; and that difference's p, Holm-corrected over arms. The latter two are None for the baseline and where no seed
    is shared.
    """
    base = collection.values(collection.baseline, metric) if collection.baseline else {}
    table: dict[str, tuple[Estimate, Estimate | None, float | None]] = {}
    ps: dict[str, float] = {}
    for arm in collection.arms:
        values = collection.values(arm.name, metric)
        if not values:
            continue
        differences = [values[seed] - base[seed] for seed in values if seed in base and arm.name != collection.baseline]
        table[arm.name] = (
            mean_over_seeds(metric, list(values.values())),
            paired_tests.paired(differences) if differences else None,
            None,
        )
        if differences and (p := paired_tests.p_value(differences)) is not None:
            ps[arm.name] = p
    for arm, p in zip(ps, paired_tests.holm(list(ps.values())), strict=True):
        table[arm] = (*table[arm][:2], p)
    return table


def arms_of(prediction: Prediction, collection: RunSet) -> set[str]:
    """Return the names of the arms that a prediction is about."""
    return {
        arm.name for named in (prediction.treatment, prediction.control) if named for arm in collection.members(named)
    }


def mean_over_seeds(metric: str, values: Sequence[float]) -> Estimate:
    """Return the mean over seeds; for a yes/no metric the share of seeds with its exact interval."""
    return paired_tests.binomial_test(values, 0.5)[0] if _is_yes_no(metric) else paired_tests.paired(values)


def by_prompt(run: RunData, baseline: RunData, column: str = "gold") -> Estimate | None:
    """Return the difference of a column of `examples.jsonl` between two runs of one seed, paired by prompt, with a
    bootstrap over prompts; it does not include variation between seeds. None if fewer than 50 prompts have it in both
    runs.
    """
    ours, theirs = (each.examples().get("prompt", {}) for each in (run, baseline))
    keys = [key for key in ours if key in theirs and None not in (ours[key].get(column), theirs[key].get(column))]
    prompts = [key.partition("#")[0] for key in keys]  # a repeated prompt is the same cluster
    if len(set(prompts)) < paired_tests.CLUSTERS:
        return None
    return paired_tests.cluster_bootstrap([ours[key][column] - theirs[key][column] for key in keys], prompts)


def _is_yes_no(metric: str) -> bool:
    return metric.startswith("health/") and " " not in metric


def _measured(prediction: Prediction, collection: RunSet) -> Verdict:
    """Return a verdict with effect and p; its word is set by `_with_word`."""
    effects, missing = effect_per_seed(prediction, collection)
    values, n = list(effects.values()), len(effects)
    verdict = Verdict(INCONCLUSIVE, seeds=list(effects), missing=missing)
    if n == 0:
        return replace(verdict, note="not measured")
    is_level = prediction.measure is Measure.level and len(collection.members(prediction.treatment)) == 1
    if is_level and _is_yes_no(prediction.metric):
        share, p = paired_tests.binomial_test([value + prediction.value for value in values], prediction.value)
        low, high = share.interval or (0.0, 1.0)
        shifted = (low - prediction.value, high - prediction.value)
        return replace(verdict, effect=Estimate(share.value - prediction.value, None, n, shifted), p=p)
    effect = paired_tests.paired(values)
    if n > 1 and paired_tests.is_constant(values):
        if prediction.metric.startswith(COUNTED):
            exact = Estimate(effect.value, None, n, (effect.value, effect.value))
            return replace(verdict, effect=exact, note="exact count, equal for every seed")
        return replace(verdict, effect=effect, note="zero variance between seeds, so no interval")
    return replace(verdict, effect=effect, p=paired_tests.p_value(values), note="one seed" if n == 1 else "")


def _with_word(
    prediction: Prediction, found: Verdict, p_holm: float | None, tests: int, unfinished: Sequence[int]
) -> Verdict:
    """Return a verdict with its word and notes. tests: number of tests that p_holm is corrected for."""
    notes = [found.note] if found.note else []
    missing = len(found.missing) - len(unfinished)
    total = len(found.missing) + len(found.seeds)
    notes += [f"{missing} of {total} seeds missing"] * (missing > 0)
    notes += [f"{len(unfinished)} of {total} seeds not finished"] * (len(unfinished) > 0)
    effect, detectable = found.effect, None
    if effect is not None and effect.se is not None and effect.n:
        alpha = paired_tests.ALPHA if prediction.direction is Direction.same else paired_tests.ALPHA / tests
        detectable = paired_tests.min_detectable_effect(effect.se * math.sqrt(effect.n), effect.n, alpha=alpha)
    is_enough = not unfinished and 2 * len(found.seeds) >= total
    word = _word(prediction, effect, p_holm) if effect is not None and is_enough else INCONCLUSIVE
    return replace(found, word=word, p_holm=p_holm, detectable=detectable, note="; ".join(notes))


def _word(prediction: Prediction, effect: Estimate, p: float | None) -> str:
    if effect.interval is None:
        return INCONCLUSIVE
    low, high, least = *effect.interval, prediction.min_effect
    if prediction.direction is Direction.same:
        if -least <= low and high <= least:
            return SUPPORTED
        return NOT_SUPPORTED if low > least or high < -least else INCONCLUSIVE
    sign = 1 if prediction.direction is Direction.more else -1
    value, most = sign * effect.value, high if sign > 0 else -low
    is_there = value > 0 and value >= least
    if low == high:  # an exact count
        return SUPPORTED if is_there else NOT_SUPPORTED
    if is_there and p is not None and p < paired_tests.ALPHA:
        return SUPPORTED
    return NOT_SUPPORTED if most < least else INCONCLUSIVE


def _unfinished_seeds(prediction: Prediction, verdict: Verdict, collection: RunSet) -> list[int]:
    """Return the seeds without an effect that have a run that has not ended."""
    arms = arms_of(prediction, collection)
    runs = [run for run in collection.runs if run.seed in verdict.missing and run.arm in arms]
    return sorted({run.seed for run in runs if run.status not in OVER})
