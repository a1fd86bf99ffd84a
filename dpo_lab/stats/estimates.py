"""Estimates: a measured value with its standard error and interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

Z_95 = statistics.NormalDist().inv_cdf(0.975)  # standard errors of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value over n examples, with standard error se and 95 % confidence interval; None where unknown."""

    value: float
    se: float | None = None
    n: int | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a metric is {self.value}, not a finite number; its inputs are broken")

    def as_record(self) -> dict[str, Any]:
        """Return the estimate as it is stored in a run's record; `from_record` reads it back."""
        return {**asdict(self), "interval": list(self.interval) if self.interval else None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Estimate:
        return cls(**{**record, "interval": tuple(record["interval"]) if record["interval"] else None})


def mean(values: Iterable[float]) -> Estimate:
    """Return the mean of independent examples with standard error and Student's t interval; no interval for one example
    or zero variance. Raises ValueError for no examples.
    """
    values = [float(v) for v in values]
    if not values:
        raise ValueError("the mean of no examples is undefined")
    average = math.fsum(values) / len(values)
    spread = math.fsum((v - average) ** 2 for v in values)
    se = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 and spread > 0 else None
    half = _t(len(values) - 1) * se if se else None
    return Estimate(average, se, len(values), (average - half, average + half) if half else None)


def ratio(totals: Sequence[float] | np.ndarray, counts: Sequence[float]) -> Estimate:
    """Return sum of totals / sum of counts over independent examples, such as nats per token from nats and tokens of
    each text.

    The standard error is linearised (Cochran 1977, "Sampling techniques", section 6.4).
    """
    n, count = len(totals), math.fsum(counts)
    value = math.fsum(totals) / count
    residual = math.fsum((total - value * part) ** 2 for total, part in zip(totals, counts, strict=True))
    if n < 2 or residual == 0:
        return Estimate(value, n=n)
    se = math.sqrt(residual * n / (n - 1)) / count
    half = _t(n - 1) * se
    return Estimate(value, se, n, (value - half, value + half))


def exp_of_ratio(totals: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Return exp of a ratio, such as perplexity, with the ratio's interval exponentiated."""
    log = ratio(totals, counts)
    value = math.exp(log.value)
    interval = (math.exp(log.interval[0]), math.exp(log.interval[1])) if log.interval else None
    return Estimate(value, value * log.se if log.se else None, log.n, interval)


def share(values: Iterable[float]) -> Estimate:
    """Return the mean of examples in [0, 1] (0, 1, or 0.5 for a tie), with Wilson's interval, which stays within [0,
    1].

    Ties vary less than 0 and 1: the interval uses the number of 0/1 examples that would have the same standard error.
    Raises ValueError if the mean is not in [0, 1].
    """
    values = [float(v) for v in values]
    estimate = mean(values)
    p, n = estimate.value, len(values)
    if not 0 <= p <= 1:
        raise ValueError(f"a share of {p} is not between 0 and 1")
    spread = math.fsum((v - p) ** 2 for v in values)
    effective = n * n * p * (1 - p) / spread if spread > 0 and any(0 < v < 1 for v in values) else n
    return replace(estimate, interval=wilson(p, effective))


def shares_of_known(
    columns: Mapping[str, np.ndarray], groups: np.ndarray | None = None
) -> Iterator[tuple[str, Estimate]]:
    """Yield name and share of each column of examples in [0, 1], [N], without those that are NaN; none if all are.

    groups: see share_by_group; None: each example is one of its own.
    """
    for name, values in columns.items():
        if (known := ~np.isnan(values)).any():
            yield name, share(values[known]) if groups is None else share_by_group(values[known], groups[known])


def share_by_group(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Return the share over values in [0, 1] [N] with the interval of share_in_groups; groups [N]: that of each value.

    The same as `share` if every value has a group of its own, or all have the same one.
    """
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return share(values) if len(counts) in (1, len(values)) else share_in_groups(values, index)


def mean_by_group(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Return the mean of values [N], with the standard error of `ratio` over groups; for groups see share_by_group."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if len(counts) in (1, len(values)):
        return mean(values)
    return replace(ratio(np.bincount(index, values), counts.tolist()), n=len(values))


def share_at_zero(values: np.ndarray, at: np.ndarray) -> Estimate | None:
    """Return the share at `at` = 0 predicted by a logistic regression of values [N] in [0, 1] on `at` [N].

    The sandwich standard error (White 1982) is valid with ties and a misspecified curve; the interval is symmetric on
    the logit scale. None if the data do not determine it: no variance in `at`, fewer than ten examples, or values that
    `at` separates (Albert and Anderson 1984).
    """
    n, scale = len(values), float(np.std(at))
    if n < 10 or scale == 0 or np.ptp(values) == 0:
        return None
    x = np.stack((np.ones(n), at / scale), 1)
    weights = np.zeros(2)
    for _ in range(50):
        p = _logistic(x @ weights)
        information = (x * (p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(information) > 1e10:
            return None
        step = np.linalg.solve(information, x.T @ (values - p))
        weights = weights + step
        if np.abs(weights).max() > 30:
            return None
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None
    p = _logistic(x @ weights)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
    scores = x * (values - p)[:, None]
    se = math.sqrt((bread @ (scores.T @ scores) @ bread)[0, 0] * n / (n - 2))
    centre, half = float(weights[0]), _t(n - 2) * se
    low, value, high = (float(_logistic(np.float64(logit))) for logit in (centre - half, centre, centre + half))
    return Estimate(value, value * (1 - value) * se, n, (low, high))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> Estimate | None:
    """Return Spearman's rank correlation, ties at their mean rank; None if all values of one side are equal.

    Interval: Fisher's z with the variance (1 + r^2 / 2) / (n - 3) of Bonett and Wright 2000, "Sample size requirements
    for estimating correlations".
    """
    from scipy import stats

    n = len(left)
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    r = float(np.corrcoef(stats.rankdata(left), stats.rankdata(right))[0, 1])
    if abs(r) > 1 - 1e-12:  # a perfect order, up to rounding
        return Estimate(math.copysign(1.0, r), n=n)
    if n < 4:
        return Estimate(r, n=n)
    z, half = math.atanh(r), float(stats.norm.ppf(0.975)) * math.sqrt((1 + r**2 / 2) / (n - 3))
    return Estimate(r, n=n, interval=(math.tanh(z - half), math.tanh(z + half)))


def share_in_groups(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Return the share over examples [N] that are correlated within groups, such as pairs of one prompt; groups [N]:
    from 0.

    Wilson's interval uses the effective number of examples: p (1 - p) divided by the variance of the mean over groups
    (linearised as in `ratio`), at most N. If that variance is 0 it is the number of groups.
    """
    n, p = len(values), float(np.mean(values))
    residual = np.bincount(groups, values - p)
    count = len(residual)
    variance = float(residual @ residual) * count / (count - 1) / n**2 if count > 1 else 0.0
    effective = min(n, p * (1 - p) / variance) if variance > 1e-18 else count
    return Estimate(p, math.sqrt(variance) if variance > 1e-18 else None, n, wilson(p, effective))


def wilson(p: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of a share p of n examples, at z standard errors (Wilson 1927, "Probable inference, the law
    of succession, and statistical inference").
    """
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def best_of(values: np.ndarray, n: int) -> np.ndarray:
    """Return an unbiased estimate of the expected maximum of n independent draws, [P], from K draws, values [P, K].

    It is the mean of the maximum over all subsets of n of the K draws; the j-th lowest of K, j from 0, is the maximum
    of C(j, n - 1) subsets. Raises ValueError for an n above K.
    """
    count = values.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"best of {n}: there are {count} candidates per prompt")
    weights = np.array([math.comb(j, n - 1) / math.comb(count, n) for j in range(count)])
    return np.sort(values, axis=1) @ weights


def _t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    from scipy import stats  # imported here, so that checking a config does not load scipy

    return float(stats.t.ppf(0.975, freedom))


def _logistic(x: np.ndarray | np.float64) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
