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
CLUSTERS = 50  # fewest that a bootstrap is trusted with
SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """What the runs say of one prediction. effect: in the metric's unit, as it was measured (a `less` that holds is below 0);
    p: two-sided; p_holm: the same paid for all predictions that it stands among; detectable: the smallest effect that as many
    seeds would have found four times of five; missing: seed -> why it has no effect; note: what limits the verdict.
    """

    word: str
    effect: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    seeds: Sequence[int] = ()
    missing: Mapping[int, str] = field(default_factory=dict)
    note: str = ""


def paired(effects: Sequence[float]) -> Estimate:
    """Mean of one effect a seed, with Student's t interval at 95 %; without one where seeds are fewer than two or all alike."""
    return Estimate(math.fsum(effects) / len(effects), n=len(effects)) if is_constant(effects) else mean(effects)


def is_constant(effects: Sequence[float]) -> bool:
    """Whether values differ by rounding at most, so that their spread says nothing of an error."""
    return max(effects) - min(effects) <= 1e-12 * max(map(abs, effects))


def p_value(effects: Sequence[float]) -> float | None:
    """Two-sided, of the paired t-test that the mean effect is 0; None where `paired` has no interval."""
    from scipy import special

    estimate = paired(effects)
    if estimate.se is None:
        return None
    return float(2 * special.stdtr(len(effects) - 1, -abs(estimate.value / estimate.se)))


def binomial_test(values: Sequence[float], null: float) -> tuple[Estimate, float]:
    """The share of seeds in which something occurred (values: 0 or 1), and the two-sided p that it is `null` in truth.

    Interval: Clopper and Pearson 1934, which covers 95 % at least however few the seeds are. p: the exact binomial test.
    """
    from scipy import stats

    found = stats.binomtest(round(math.fsum(values)), len(values), null)
    interval = found.proportion_ci(1 - ALPHA, "exact")
    share = Estimate(float(found.statistic), None, len(values), (float(interval.low), float(interval.high)))
    return share, float(found.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false find among them stays below alpha (Holm 1979).

    That of statsmodels collects all of Python's garbage at every call, a fifth of a second each.
    """
    order = np.argsort(np.asarray(ps, float))
    stepped = np.maximum.accumulate(np.asarray(ps, float)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    adjusted = np.empty(len(ps))
    adjusted[order] = stepped
    return [float(p) for p in adjusted]


def min_detectable_effect(sd: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest mean effect that a two-sided paired t-test over n >= 2 seeds finds with that power; sd: between seeds.

    What statsmodels' TTestPower is for; its solver, and the noncentral t below it, go astray for few seeds at an alpha that
    Holm has divided, so that the power is integrated here, over what the seeds' own spread may come out as.
    """
    return sd * _detectable(n, power, alpha)


@lru_cache(maxsize=256)
def _detectable(n: int, power: float, alpha: float) -> float:
    from scipy import optimize, special

    freedom, points = n - 1, 20_000
    critical = special.stdtrit(freedom, 1 - alpha / 2)
    chances = (np.arange(points) + 0.5) / points
    needed = critical * np.sqrt(2 * special.gammaincinv(freedom / 2, chances) / freedom)  # mean / (true sd / sqrt(n))

    def lacks(effect: float) -> float:
        centre = effect * math.sqrt(n)
        return float(np.mean(special.ndtr(centre - needed) + special.ndtr(-centre - needed))) - power

    high = 1.0
    while lacks(high) < 0:
        high *= 2
    return float(optimize.brentq(lacks, 0.0, high, xtol=1e-6))  # pyright: ignore[reportArgumentType]


def cluster_bootstrap(
    values: Sequence[float] | np.ndarray, clusters: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of examples of which those of one cluster are not independent, such as samples of one prompt; clusters: [N].

    Whole clusters are drawn again; se: of the draws; interval: their percentiles, moved out for the finite number of
    clusters (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3). Same input, same result.
    Raises ValueError below 50 clusters, and so for seeds, of which there are never as many: `paired` is theirs.
    """
    from scipy import special

    _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(numbers)
    n = len(counts)
    if n < CLUSTERS:
        raise ValueError(f"{n} clusters: a bootstrap needs {CLUSTERS}; take a t interval over fewer")
    totals = np.bincount(numbers, np.asarray(values, float))
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 1000):  # a bounded piece of memory at a time
        picks = rng.integers(n, size=(min(1000, draws - start), n))
        means[start : start + len(picks)] = totals[picks].sum(1) / counts[picks].sum(1)
    outer = special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, ALPHA / 2))
    low, high = np.quantile(means, [outer, 1 - outer])
    spread = float(means.std(ddof=1))
    return Estimate(float(totals.sum() / counts.sum()), spread or None, len(numbers), (float(low), float(high)))
