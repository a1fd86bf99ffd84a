"""A measured number with what is known of its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A figure over n examples; se is its standard error, interval its 95 % confidence interval, None where not known."""

    value: float
    se: float | None = None
    n: int | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a metric came out as {self.value}: something before it is broken")

    def as_record(self) -> dict[str, Any]:
        """For a run's record; `from_record` is the way back."""
        return {**asdict(self), "interval": list(self.interval) if self.interval else None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Estimate:
        return cls(**{**record, "interval": tuple(record["interval"]) if record["interval"] else None})


def mean(values: Iterable[float]) -> Estimate:
    """Mean of independent examples, its standard error and Student's t interval; neither for one example or no spread."""
    values = [float(v) for v in values]
    if not values:
        raise ValueError("a mean over no examples")
    average = math.fsum(values) / len(values)
    spread = math.fsum((v - average) ** 2 for v in values)
    se = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 and spread > 0 else None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * se if se else None
    return Estimate(average, se, len(values), (average - half, average + half) if half else None)


def ratio(totals: Sequence[float], counts: Sequence[float]) -> Estimate:
    """All totals / all counts over independent examples, such as nats a token from nats and tokens of each text.

    The standard error is the linearised one (Cochran 1977, "Sampling techniques", section 6.4).
    """
    n, count = len(totals), math.fsum(counts)
    value = math.fsum(totals) / count
    left = math.fsum((total - value * part) ** 2 for total, part in zip(totals, counts, strict=True))
    if n < 2 or left == 0:
        return Estimate(value, n=n)
    se = math.sqrt(left * n / (n - 1)) / count
    half = float(stats.t.ppf(0.975, n - 1)) * se
    return Estimate(value, se, n, (value - half, value + half))


def exp_of_ratio(totals: Sequence[float], counts: Sequence[float]) -> Estimate:
    """exp of a ratio, such as perplexity; the ratio's interval is exponentiated."""
    of = ratio(totals, counts)
    value = math.exp(of.value)
    interval = (math.exp(of.interval[0]), math.exp(of.interval[1])) if of.interval else None
    return Estimate(value, value * of.se if of.se else None, of.n, interval)


def share(values: Iterable[float]) -> Estimate:
    """Mean of examples that lie in [0, 1] (yes, no, or half for a tie), with Wilson's interval, which stays in there too.

    Ties make the true interval a little narrower than this one.
    """
    estimate = mean(values)
    if not 0 <= estimate.value <= 1:
        raise ValueError(f"a share of {estimate.value}: not between 0 and 1")
    return replace(estimate, interval=_wilson(estimate.value, estimate.n or 0))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> Estimate | None:
    """Spearman's, ties sharing their mean rank; None where one side is all alike. Interval: Fisher's z with the variance
    (1 + r^2 / 2) / (n - 3) of Bonett and Wright 2000, "Sample size requirements for estimating correlations".
    """
    n = len(left)
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    r = float(np.corrcoef(stats.rankdata(left), stats.rankdata(right))[0, 1])
    if abs(r) > 1 - 1e-12:  # a perfect order, but for rounding
        return Estimate(math.copysign(1.0, r), n=n)
    if n < 4:
        return Estimate(r, n=n)
    z, half = math.atanh(r), float(stats.norm.ppf(0.975)) * math.sqrt((1 + r**2 / 2) / (n - 3))
    return Estimate(r, n=n, interval=(math.tanh(z - half), math.tanh(z + half)))


def share_in_groups(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The same of examples of which those of one group are alike, pairs of one prompt say; groups [N]: numbers from 0.

    Wilson's interval at the effective number of examples: p (1 - p) by the variance of the mean over groups (linearised as
    in `exp_of_ratio`), at most all of them. Where no spread tells that variance it is the number of groups.
    """
    n, p = len(values), float(np.mean(values))
    left = np.bincount(groups, values - p)
    count = len(left)
    variance = float(left @ left) * count / (count - 1) / n**2 if count > 1 else 0.0
    effective = min(n, p * (1 - p) / variance) if variance > 1e-18 else count
    return Estimate(p, math.sqrt(variance) if variance > 1e-18 else None, n, _wilson(p, effective))


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson 1927, "Probable inference, the law of succession, and statistical inference"."""
    z = float(stats.norm.ppf(0.975))
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
