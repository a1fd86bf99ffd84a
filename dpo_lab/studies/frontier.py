"""The reward-KL frontier: the best attainable by tilting the initial policy's samples, and an arm's area below it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_lab.stats.estimates import best_of
from dpo_lab.studies.run_data import NotMeasured, RunSet

GAIN, KL = "gold_gain", "kl"
# Upper limit of the area. Useful policies of the synthetic review task lie below it; the optimum's line from 128 Gaussian
# candidates is 3 % too low there, 1 % at 1 nat, and divides the areas of all arms of a seed equally.
KL_MAX = 2.0
TRUSTED = 20.0  # fewest effective candidates per prompt for a reliable optimum
TILTS = np.geomspace(0.1, 10.0, 25)  # in units of 1 / sd of the gold reward


@dataclass(frozen=True)
class Point:
    """A policy by reward and KL. gain: over the initial policy, in sd of its reward; kl: nats to the initial policy;
    ess: effective number of candidates per prompt, infinite if it was not estimated from candidates.
    """

    gain: float
    kl: float
    ess: float = math.inf

    @property
    def is_trusted(self) -> bool:
        return self.ess >= TRUSTED


def tilt(rewards: np.ndarray, betas: Sequence[float] | np.ndarray) -> list[Point]:
    """Return the optimum of reward - beta KL for each beta, initial x exp(reward / beta) / Z per prompt (Rafailov et
    al. 2023, equation 4), estimated by weighting candidates of the initial policy; rewards [P, K].

    gain: mean over prompts of weighted minus unweighted mean, divided by the sd of all candidates. kl: mean of sum w
    log(K w). ess: mean of 1 / sum w^2 (Kish 1965). One beta for all prompts maximises the sum over prompts. Exact if
    the K candidates are all possible responses and equally likely; otherwise slightly too low while ess is large. kl is
    at most log K nats.
    """
    sd = _sd(rewards)
    points = []
    for beta in betas:
        logs = rewards / beta
        logs = logs - logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        weights = np.exp(logs)
        gain = ((weights * rewards).sum(1) - rewards.mean(1)).mean() / sd
        kl = (weights * (logs + math.log(rewards.shape[1]))).sum(1).mean()
        points.append(Point(float(gain), float(kl), float((1 / (weights**2).sum(1)).mean())))
    return points


def best_of_n(rewards: np.ndarray, ns: Sequence[int]) -> list[Point]:
    """Return best of n samples of the initial policy by gold reward, for each n <= K; rewards [P, K].

    gain: unbiased, the mean maximum over all subsets of n of a prompt's K candidates. kl: log n - (n - 1) / n, an upper
    bound (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy"): the true KL is lower if
    rewards tie, or if n approaches the number of likely responses. Raises ValueError for an n above K.
    """
    sd = _sd(rewards)
    return [Point(float((best_of(rewards, n) - rewards.mean(1)).mean() / sd), math.log(n) - (n - 1) / n) for n in ns]


def hull(points: Iterable[Point], kl_max: float = KL_MAX) -> list[tuple[float, float]]:
    """Return the frontier of some policies and the initial one: corners (kl, gain) of the smallest concave,
    non-decreasing line that lies on or above all of them and (0, 0), up to kl_max.

    Points between two corners are reached by choosing one of two policies at random for every prompt: the gain lies on
    the line, the KL at most there, as it is convex. After the last corner the line is level. A KL estimated below 0
    counts as 0.
    """
    corners: list[tuple[float, float]] = []
    for kl, gain in sorted({(0.0, 0.0), *((max(0.0, p.kl), p.gain) for p in points)}, key=lambda it: (it[0], -it[1])):
        if corners and gain <= corners[-1][1]:
            continue
        while len(corners) > 1 and _turns_up(corners[-2], corners[-1], (kl, gain)):
            corners.pop()
        corners.append((kl, gain))
    inside = [corner for corner in corners if corner[0] < kl_max]
    at_most = float(np.interp(kl_max, [kl for kl, _ in corners], [gain for _, gain in corners]))
    return [*inside, (kl_max, at_most)]


def area(points: Iterable[Point], optimum: Iterable[Point], kl_max: float = KL_MAX) -> float:
    """Return the area under the frontier of `points` over KL from 0 to kl_max, as a share of the optimum's area.

    Raises ValueError if the optimum has no gain.
    """
    total = _area_under(hull(optimum, kl_max))
    if total <= 0:
        raise ValueError("the optimum gains nothing: all candidates of a prompt have the same reward")
    return _area_under(hull(points, kl_max)) / total


def of_arms(collection: RunSet, named: str, seed: int) -> list[Point]:
    """Return the policies of an arm or a group. Raises NotMeasured if one of them has no gain or no KL."""
    found = []
    for arm in collection.members(named):
        run = collection.run(arm.name, seed)
        if run is None:
            raise NotMeasured(f"{arm.name}, seed {seed}: no run")
        found.append(Point(run.value(GAIN), run.value(KL)))
    return found


def optimum(collection: RunSet, seed: int) -> list[Point]:
    """Return the optimum's line of a seed, weakest tilt first, from the candidates of any run of that seed or from an
    archived record. Empty if no run has candidates.
    """
    if "optimum" in collection.record:
        return [Point(*point) for point in collection.record["optimum"].get(str(seed), ())]
    rewards = candidates(collection, seed)
    return [] if rewards is None else tilt(rewards, _sd(rewards) / TILTS)


def candidates(collection: RunSet, seed: int) -> np.ndarray | None:
    """Return gold rewards [P, K] of a seed's candidates, prompts in the order of their keys; None if there are none, or
    if all rewards are equal.
    """
    for run in collection.runs:
        if run.seed == seed and run.is_done and (found := run.candidates()):
            rewards = np.array([found[key] for key in sorted(found)])
            return rewards if np.ptp(rewards) > 0 else None
    return None


def _sd(rewards: np.ndarray) -> float:
    """Return the sd over all candidates, between and within prompts, as gold_gain does for samples."""
    return float(rewards.std())


def _area_under(corners: Sequence[tuple[float, float]]) -> float:
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(corners))


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Return whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
