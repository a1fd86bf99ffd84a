"""How many seeds decide a prediction: simulated studies whose effects have the mean and spread of earlier runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_lab.stats.paired_tests import ALPHA, POWER
from dpo_lab.studies import sequential
from dpo_lab.studies.spec import Direction, Prediction

STUDIES, MOST = 1000, 100  # simulated; seeds of each


@dataclass(frozen=True)
class Power:
    """What it takes to decide a prediction. effect, sd: of the effects of earlier runs, one per seed; fixed: fewest seeds
    of a fixed number with which 80 % of studies are decided, None if more than MOST; ends: after how many seeds each
    study with a look after every seed is decided, [STUDIES], infinite if not by MOST.
    """

    effect: float
    sd: float
    fixed: int | None
    ends: np.ndarray


def power(prediction: Prediction, effects: Sequence[float], tests: int, draw: int = 0) -> Power | None:
    """Return the power of a prediction, whose effects of earlier runs are `effects`; None for fewer than two of them, or
    if they are all equal.

    tests: number of predictions that p values are corrected for; draw: predictions with another one are independent.
    Effects are drawn from a normal distribution, with the mean and sd of the earlier ones taken as the true ones, which
    makes few earlier seeds seem more certain than they are.
    """
    values = np.asarray(effects, float)
    if len(values) < 2 or not (sd := float(values.std(ddof=1))) > 0:
        return None
    mean = float(values.mean())
    drawn = np.random.default_rng(draw).normal(mean, sd, (STUDIES, MOST))
    at_once = _is_decided(prediction, drawn, *_t_intervals(drawn, ALPHA), *_t_intervals(drawn, ALPHA / tests))
    looked = _is_decided(
        prediction,
        drawn,
        *sequential.confidence_sequences(drawn, 1 - ALPHA),
        *sequential.confidence_sequences(drawn, 1 - ALPHA / tests),
    )
    enough = np.flatnonzero(at_once.mean(0) >= POWER)
    ends = np.where(looked.any(1), looked.argmax(1) + 1.0, math.inf)
    return Power(mean, sd, int(enough[0]) + 1 if len(enough) else None, ends)


def expected(ends: np.ndarray, most: int) -> tuple[float, float]:
    """Return the mean number of seeds of studies that stop when decided or at `most`, and the share that is decided."""
    return float(np.minimum(ends, most).mean()), float((ends <= most).mean())


def _is_decided(
    prediction: Prediction, effects: np.ndarray, low: np.ndarray, high: np.ndarray, below: np.ndarray, above: np.ndarray
) -> np.ndarray:
    """Return whether a prediction is decided after each seed, [studies, seeds].

    low, high: 95 % intervals; below, above: those at the level corrected for the number of tests (of Bonferroni, which
    Holm's correction is at its strictest).
    """
    least = prediction.least
    if prediction.direction is Direction.same:
        return ((low >= -least) & (high <= least)) | (low > least) | (high < -least)
    means = effects.cumsum(1) / np.arange(1, effects.shape[1] + 1)
    if prediction.direction is Direction.less:
        means, low, high, below, above = -means, -high, -low, -above, -below
    return ((below > 0) & (means >= least)) | (high < least)


def _t_intervals(effects: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of Student's t interval after each seed, two arrays [studies, seeds]; infinite after one seed."""
    from scipy import special

    n = np.arange(1, effects.shape[1] + 1)
    means = effects.cumsum(1) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.sqrt(np.maximum((effects**2).cumsum(1) / n - means**2, 0) / (n - 1))
        half = special.stdtrit(n - 1, 1 - alpha / 2) * se
    half[:, 0] = math.inf
    return means - half, means + half
