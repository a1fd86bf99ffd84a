"""Statistics of paired seeds: t intervals, Holm's correction, and the effect that n seeds could have detected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from dpo_lab.stats.estimates import Estimate, mean

ALPHA = 0.05
POWER = 0.8
CLUSTERS = 50  # fewest clusters for a bootstrap
SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one prediction. word: supported, not supported or inconclusive; effect: on the prediction's scale,
    with sign (a supported `less` is below 0); p: two-sided; p_holm: Holm-corrected over the predictions of its family;
    detectable: the smallest effect that this number of seeds detects at power 0.8; missing: seed -> why it has no
    effect; note: what limits the verdict; interval_kind: what interval and p are valid for.
    """

    word: str
    effect: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    seeds: Sequence[int] = ()
    missing: Mapping[int, str] = field(default_factory=dict)
    note: str = ""
    interval_kind: str = ""


def paired(effects: Sequence[float]) -> Estimate:
    """Return the mean of one effect per seed with Student's t interval; without one for a single seed or equal effects."""
    return Estimate(math.fsum(effects) / len(effects), n=len(effects)) if is_constant(effects) else mean(effects)


def is_constant(effects: Sequence[float]) -> bool:
    """Return whether values are equal up to rounding, so that their variance gives no error estimate."""
    return max(effects) - min(effects) <= 1e-12 * max(map(abs, effects))


def p_value(effects: Sequence[float]) -> float | None:
    """Return the two-sided p value of the paired t-test that the mean effect is 0; None if `paired` has no interval."""
    from scipy import special

    estimate = paired(effects)
    if estimate.se is None:
        return None
    return float(2 * special.stdtr(len(effects) - 1, -abs(estimate.value / estimate.se)))


def binomial_test(values: Sequence[float], null: float) -> tuple[Estimate, float]:
    """Return the share of seeds in which something occurred (values: 0 or 1), and the two-sided p of a true share of
    `null`.

    Interval: Clopper and Pearson 1934, which covers at least 95 % for any number of seeds. p: the exact binomial test.
    """
    from scipy import stats

    found = stats.binomtest(round(math.fsum(values)), len(values), null)
    interval = found.proportion_ci(1 - ALPHA, "exact")
    share = Estimate(float(found.statistic), None, len(values), (float(interval.low), float(interval.high)))
    return share, float(found.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values adjusted to control the family-wise error rate (Holm 1979).

    statsmodels' version runs Python's garbage collector at every call, which takes a fifth of a second.
    """
    order = np.argsort(np.asarray(ps, float))
    stepped = np.maximum.accumulate(np.asarray(ps, float)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    adjusted = np.empty(len(ps))
    adjusted[order] = stepped
    return [float(p) for p in adjusted]


def min_detectable_effect(sd: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest mean effect that a two-sided paired t-test over n >= 2 seeds detects with this power; sd:
    between seeds.

    statsmodels' TTestPower computes the same, but its solver and the noncentral t fail for few seeds at a
    Holm-corrected alpha; the power is therefore integrated here over the distribution of the seeds' standard deviation.
    """
    return sd * _detectable(n, power, alpha)


@lru_cache(maxsize=256)
def _detectable(n: int, power: float, alpha: float) -> float:
    from scipy import optimize, special

    freedom, points = n - 1, 20_000
    critical = special.stdtrit(freedom, 1 - alpha / 2)
    chances = (np.arange(points) + 0.5) / points
    needed = critical * np.sqrt(2 * special.gammaincinv(freedom / 2, chances) / freedom)  # mean / (true sd / sqrt(n))

    def excess_power(effect: float) -> float:
        centre = effect * math.sqrt(n)
        return float(np.mean(special.ndtr(centre - needed) + special.ndtr(-centre - needed))) - power

    high = 1.0
    while excess_power(high) < 0:
        high *= 2
    return float(optimize.brentq(excess_power, 0.0, high, xtol=1e-6))  # pyright: ignore[reportArgumentType]


def cluster_bootstrap(
    values: Sequence[float] | np.ndarray, clusters: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean of examples that are dependent within clusters, such as samples of one prompt; values, clusters:
    [N].

    Clusters are resampled; se: standard deviation of the draws; interval: their percentiles, widened for the finite
    number of clusters (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3). Deterministic.
    Raises ValueError below 50 clusters, and therefore for seeds; use `paired` for those.
    """
    from scipy import special

    _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(numbers)
    n = len(counts)
    if n < CLUSTERS:
        raise ValueError(f"{n} clusters: a bootstrap needs {CLUSTERS}; use a t interval for fewer")
    totals = np.bincount(numbers, np.asarray(values, float))
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 1000):  # bounds memory
        picks = rng.integers(n, size=(min(1000, draws - start), n))
        means[start : start + len(picks)] = totals[picks].sum(1) / counts[picks].sum(1)
    outer = special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, ALPHA / 2))
    low, high = np.quantile(means, [outer, 1 - outer])
    spread = float(means.std(ddof=1))
    return Estimate(float(totals.sum() / counts.sum()), spread or None, len(numbers), (float(low), float(high)))
