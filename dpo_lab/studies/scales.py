"""The scale of a metric: ratio quantities are compared by factors, shares by points or odds, all else by differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate


class Kind(Enum):
    """What sort of number a metric is."""

    ratio = "ratio"  # above 0, with a natural zero: a factor means the same at every size
    share = "share"  # from 0 to 1
    plain = "plain"


class Scale(str, Enum):
    """The scale on which an effect is computed; on the latter two it is told as a factor."""

    by_metric = "by_metric"  # log for a ratio quantity, otherwise plain; replaced by it when a prediction is read
    plain = "plain"
    log = "log"  # natural logarithm: factors
    log_odds = "log_odds"  # of a share: odds ratios


# Kinds by a metric's name without what stands before its last slash (`initial/perplexity`), or by its first part.
KINDS = {
    **dict.fromkeys(("kl", "kl_per_token", "perplexity", "length", "peak_memory_bytes"), Kind.ratio),
    **dict.fromkeys(("seconds", "memory", "tokens_per_second"), Kind.ratio),
    **dict.fromkeys(("accuracy", "true_accuracy", "win_rate", "win_rate_equal_length", "well_formed"), Kind.share),
    **dict.fromkeys(("stopped", "ties", "chosen_fell", "health", "distinct_1", "distinct_2", "repeated_3"), Kind.share),
}


def kind_of(expression: str) -> Kind:
    """Return the kind of a metric, or of `a - b`, `a / b`, or `a at b 0.9` of two."""
    left, sign, right = [*expression.split(" "), "", ""][:3]
    first = _kind_of_name(left)
    if sign == "/":
        return Kind.ratio if first is _kind_of_name(right) is Kind.ratio else Kind.plain
    return Kind.plain if sign == "-" else first


def is_yes_no(metric: str) -> bool:
    """Return whether a metric is 0 or 1 in every run: a health finding."""
    return metric.startswith("health/") and " " not in metric


def default_scale(expression: str) -> Scale:
    """Return the scale of effects on a metric, unless a prediction states another."""
    return Scale.log if kind_of(expression) is Kind.ratio else Scale.plain


def on_scale(scale: Scale, value: float, n: int | None = None) -> float:
    """Return a value on a scale. n: examples that a share is of.

    Log-odds of a share of n examples are log((k + 1/2) / (n - k + 1/2)), k = n value, which are finite at 0 and at 1
    (Haldane 1956, Anscombe 1956). Raises ValueError for a value that has no logarithm.
    """
    if scale is Scale.log:
        if not value > 0:
            raise ValueError(f"{value:g} has no logarithm; state scale: plain")
        return math.log(value)
    if scale is Scale.log_odds:
        part = (value * n + 0.5) / (n + 1) if n else value
        if not 0 < part < 1:
            raise ValueError(f"{value:g} has no finite log-odds; state scale: plain")
        return math.log(part / (1 - part))
    return value


def as_told(scale: Scale, estimate: Estimate) -> Estimate:
    """Return an effect as it is told: of a scale of logarithms the factor, with its interval and without an error."""
    if scale is Scale.plain:
        return estimate
    interval = tuple(map(factor, estimate.interval)) if estimate.interval else None
    return Estimate(factor(estimate.value), None, estimate.n, interval)  # pyright: ignore[reportArgumentType]


def factor(log: float) -> float:
    """Return exp of a logarithm, at most 1e300."""
    return math.exp(min(log, math.log(1e300)))


def prefix(scale: Scale) -> str:
    """Return what stands before an effect: `x ` for a factor, `odds x ` for an odds ratio, nothing for a difference."""
    return {Scale.log: "x ", Scale.log_odds: "odds x "}.get(scale, "")


def mean_over_seeds(metric: str, values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with an interval that stays within what the metric can be.

    A ratio quantity: the geometric mean, with Student's t interval of the logarithm. A yes/no metric: the share with its
    exact binomial interval. Otherwise Student's t, cut at 0 and 1 for a share, and at 0 for a ratio quantity with a value
    at or below 0, as an estimate of a small KL can be.
    """
    if is_yes_no(metric):
        return paired_tests.binomial_test(values, 0.5)[0]
    kind = kind_of(metric)
    if kind is Kind.ratio and min(values) > 0:
        return as_told(Scale.log, paired_tests.paired([math.log(value) for value in values]))
    estimate = paired_tests.paired(values)
    if kind is Kind.plain or estimate.interval is None:
        return estimate
    low, high = estimate.interval
    most = 1.0 if kind is Kind.share else math.inf
    return replace(estimate, interval=(max(0.0, low), min(most, high)))


def axis_of(metric: str, values: Sequence[float]) -> str:
    """Return the axis of a figure for a metric's values: log for a ratio quantity if all are above 0, else linear."""
    return "log" if kind_of(metric) is Kind.ratio and min(values, default=0.0) > 0 else "linear"


def paired_difference(metric: str, values: Sequence[float], base: Sequence[float]) -> tuple[Scale, list[float]]:
    """Return the differences of paired values on the metric's default scale; plain if one of them has no logarithm."""
    scale = default_scale(metric) if min([*values, *base], default=1.0) > 0 else Scale.plain
    return scale, [on_scale(scale, a) - on_scale(scale, b) for a, b in zip(values, base, strict=True)]


def _kind_of_name(name: str) -> Kind:
    parts = name.split("/")
    return KINDS.get(parts[-1]) or KINDS.get(parts[0]) or Kind.plain
