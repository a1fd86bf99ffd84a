"""Anytime-valid inference for the mean of one effect per seed: e-values, confidence sequences and p values.

They stay valid if one looks after every seed and stops when one likes, which a t-test over a fixed number of seeds does
not. The e-value of a mean is the Bayes factor of Student's t with a N(0, g) prior on the effect size, effect / sd, and
the right Haar prior 1 / sd (Rouder et al. 2009, "Bayesian t tests", and Liang et al. 2008, "Mixtures of g priors"):

    e_n = (1 + n g)^(-1/2) [(1 + t^2 / v) / (1 + t^2 / ((1 + n g) v))]^((v + 1) / 2),  v = n - 1

It is an e-process under optional stopping (Hendriksen, de Heide and Gruenwald, arXiv:1807.09077; Wang and Ramdas,
arXiv:2310.03722), for effects that are normal over seeds. Symmetric heavy tails make it conservative; skewed effects
break it, so `is_skewed` is reported with it. `python -m benchmarks.sequential` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate

ALPHA = paired_tests.ALPHA


def log_e_values(effects: Sequence[float] | np.ndarray, null: float = 0.0, g: float = 1.0) -> np.ndarray:
    """Return log e of the mean `null` after each seed, [..., N] from effects [..., N] in the order of the looks.

    It is 0 where there is nothing to judge by: for the first seed, and while all effects so far are equal.
    """
    means, spreads, n = _running(np.asarray(effects, float))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = n * (means - null) ** 2 / spreads  # t^2 / (n - 1)
        grown = 1 + n * g
        found = 0.5 * (n * (np.log1p(ratio) - np.log1p(ratio / grown)) - np.log(grown))
    return np.where(spreads > 0, found, 0.0)


def e_value(effects: Sequence[float], null: float, g: float = 1.0) -> float:
    """Return the e-value of the mean `null` after the last seed: at least 20 refutes it at 5 %, whenever one looks.

    1.0 for fewer than two effects, and for effects that are all equal.
    """
    return math.exp(log_e_values(effects, null, g)[-1]) if len(effects) else 1.0


def p_value(effects: Sequence[float], null: float = 0.0, g: float = 1.0) -> float:
    """Return the anytime-valid p value of the mean `null`: 1 / the largest e-value over all looks, at most 1."""
    return math.exp(-max(0.0, float(log_e_values(effects, null, g).max()))) if len(effects) else 1.0


def confidence_sequence(effects: Sequence[float], level: float = 0.95, g: float = 1.0) -> tuple[float, float]:
    """Return the means whose e-value after the last seed is below 1 / (1 - level).

    The ends are infinite for few seeds (up to 4 at 95 % and g = 1) and for effects that are all equal.
    """
    if len(effects) < 2:
        return -math.inf, math.inf
    low, high = confidence_sequences(effects, level, g)
    return float(low[-1]), float(high[-1])


def confidence_sequences(
    effects: Sequence[float] | np.ndarray, level: float = 0.95, g: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the confidence sequence after each seed, two arrays [..., N] from effects [..., N].

    e_n < 1 / alpha solved for t^2: t^2 / v < (A - 1) / (1 - A / (1 + n g)), where A = (sqrt(1 + n g) / alpha)^(2 / n).
    """
    means, spreads, n = _running(np.asarray(effects, float))
    grown = 1 + n * g
    factor = (np.sqrt(grown) / (1 - level)) ** (2 / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.sqrt(spreads / n * (factor - 1) / (1 - factor / grown))
    half = np.where((spreads > 0) & (factor < grown), half, math.inf)
    return means - half, means + half


def share_log_e_values(occurred: Sequence[float] | np.ndarray, null: float) -> np.ndarray:
    """Return log e of the share `null` after each seed, [N]; occurred: [N], 1 where something occurred, otherwise 0.

    The mixture of binomial likelihood ratios over a Beta(1/2, 1/2) prior on the share, an e-process for any `null`
    (Robbins 1970, "Statistical methods related to the law of the iterated logarithm"). A share of 0 or 1 that was not
    so in every seed has log e infinity.
    """
    from scipy import special

    n = np.arange(1, len(occurred) + 1)
    k = np.cumsum(occurred)
    likelihood = special.xlogy(k, null) + special.xlogy(n - k, 1 - null)
    return special.betaln(k + 0.5, n - k + 0.5) - special.betaln(0.5, 0.5) - likelihood


def share_confidence_sequence(occurred: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the shares whose e-value after the last seed is below 1 / (1 - level)."""
    from scipy import optimize

    def excess(null: float) -> float:
        return float(share_log_e_values(occurred, null)[-1]) + math.log(1 - level)

    share = math.fsum(occurred) / len(occurred)
    low = optimize.brentq(excess, 1e-12, share) if share > 0 else 0.0
    high = optimize.brentq(excess, share, 1 - 1e-12) if share < 1 else 1.0
    return float(low), float(high)  # pyright: ignore[reportArgumentType]


def tested(effects: Sequence[float], anytime: bool) -> tuple[Estimate, float | None]:
    """Return the mean of effects over seeds with its interval, and p; None where one seed, or equal ones, give none.

    anytime: whether they have to stay valid after any look; else they are Student's t.
    """
    effect = paired_tests.paired(effects)
    if not anytime or (len(effects) > 1 and paired_tests.is_constant(effects)):
        return effect, paired_tests.p_value(effects)
    low, high = confidence_sequence(effects)
    return replace(effect, interval=(low, high) if math.isfinite(high) else None), p_value(effects)


def is_skewed(effects: Sequence[float]) -> bool:
    """Return whether the skewness of effects is over two of its standard errors under a normal distribution (Joanes and
    Gill 1998, "Comparing measures of sample skewness and kurtosis", G1); False for fewer than 3 effects.

    It fires for about one study of 20 with normal effects, and misses much at few seeds: a warning, not a test.
    """
    values, n = np.asarray(effects, float), len(effects)
    if n < 3 or not _running(values)[1][-1] > 0:
        return False
    centred = values - values.mean()
    g1 = float((centred**3).mean() / (centred**2).mean() ** 1.5)
    skewness = g1 * math.sqrt(n * (n - 1)) / (n - 2)
    return abs(skewness) > 2 * math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))


def _running(effects: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means and sums of squared deviations of the first n effects, each [..., N], and n [N]; the sum is 0 where
    these effects are equal up to rounding.
    """
    n = np.arange(1, effects.shape[-1] + 1)
    first = effects[..., :1]
    apart = effects - first  # from the first effect, so that squares lose no digits
    offset = np.cumsum(apart, -1) / n
    squares = np.maximum(np.cumsum(apart**2, -1) - n * offset**2, 0.0)
    rounding = n * (1e-12 * np.maximum.accumulate(np.abs(effects), -1)) ** 2
    return first + offset, np.where(squares > rounding, squares, 0.0), n
