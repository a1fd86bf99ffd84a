"""Differences that no prediction names: each arm's metrics against the baseline's, and between two runs by prompt."""

from __future__ import annotations

import math
from typing import NamedTuple

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate, mean
from dpo_lab.studies import sequential
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.scales import Scale, as_told, mean_over_seeds, paired_difference
from dpo_lab.studies.seed_effects import is_anytime
from dpo_lab.studies.spec import Measure, Prediction


class Comparison(NamedTuple):
    """An arm's mean over seeds and its difference to the baseline: None for the baseline, and where no seed is shared.

    scale: of the difference, which is a factor if that is log; p: Holm-corrected over arms.
    """

    mean: Estimate
    difference: Estimate | None = None
    p: float | None = None
    scale: Scale = Scale.plain


def versus_baseline(collection: RunSet, metric: str) -> dict[str, Comparison]:
    """Return, for each arm that measured the metric: its mean over seeds, and its difference to the baseline, paired by
    seed, with p Holm-corrected over arms.

    Ratio quantities have geometric means and their differences are factors, unless a value is at or below 0. Where seeds are
    added until the study is decided, intervals of differences and p are anytime-valid.
    """
    base = collection.values(collection.baseline, metric) if collection.baseline else {}
    table: dict[str, Comparison] = {}
    ps: dict[str, float] = {}
    for arm in collection.arms:
        values = collection.values(arm.name, metric)
        if not values:
            continue
        level = mean_over_seeds(metric, list(values.values()))
        shared = [seed for seed in values if seed in base and arm.name != collection.baseline]
        if not shared:
            table[arm.name] = Comparison(level)
            continue
        scale, apart = paired_difference(metric, [values[seed] for seed in shared], [base[seed] for seed in shared])
        difference, p = sequential.tested(apart, is_anytime(collection.record))
        table[arm.name] = Comparison(level, as_told(scale, difference), None, scale)
        if p is not None:
            ps[arm.name] = p
    for arm, p in zip(ps, paired_tests.holm(list(ps.values())), strict=True):
        table[arm] = table[arm]._replace(p=p)
    return table


def by_prompt(run: RunData, baseline: RunData, column: str = "gold") -> Estimate | None:
    """Return the difference of a column of `examples.jsonl` between two runs of one seed, paired by prompt, with a
    bootstrap over prompts; it does not include variation between seeds. None if fewer than 50 prompts have it in both
    runs.
    """
    apart = _by_prompt(run, baseline, column)
    if len(apart) < paired_tests.CLUSTERS:
        return None
    prompts = [prompt for prompt, differences in apart.items() for _ in differences]
    return paired_tests.cluster_bootstrap([each for differences in apart.values() for each in differences], prompts)


def share_from_prompts(prediction: Prediction, collection: RunSet) -> float | None:
    """Return the part of the variance between seeds of a difference in gold reward that comes from the finite number of
    prompts, which more prompts would reduce.

    None for other predictions, and unless two seeds or more have values by prompt of both arms.
    """
    arms = [collection.members(named) for named in (prediction.treatment, prediction.control)]
    if prediction.metric != "gold_gain" or prediction.measure is not Measure.difference or prediction.matched_on:
        return None
    if any(len(members) != 1 for members in arms):
        return None
    effects, variances = [], []
    for seed in collection.seeds:
        left, right = (collection.run(members[0].name, seed) for members in arms)
        apart = _by_prompt(left, right, "gold") if left and right else {}
        if len(apart) > 1:
            estimate = mean(math.fsum(each) / len(each) for each in apart.values())
            effects.append(estimate.value)
            variances.append((estimate.se or 0.0) ** 2)
    if len(effects) < 2 or paired_tests.is_constant(effects):
        return None
    between = math.fsum((effect - mean(effects).value) ** 2 for effect in effects) / (len(effects) - 1)
    return min(1.0, math.fsum(variances) / len(variances) / between)


def _by_prompt(run: RunData, baseline: RunData, column: str) -> dict[str, list[float]]:
    """Return the differences of a column of `examples.jsonl` between two runs, by prompt; a repeated prompt has several."""
    ours, theirs = (each.examples().get("prompt", {}) for each in (run, baseline))
    found: dict[str, list[float]] = {}
    for key in ours:
        if key in theirs and None not in (ours[key].get(column), theirs[key].get(column)):
            found.setdefault(key.partition("#")[0], []).append(ours[key][column] - theirs[key][column])
    return found
