"""The reward-KL frontier: the best attainable by tilting the initial policy's samples, and an arm's area below it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_lab.studies.run_data import NotMeasured, RunSet

GAIN, KL = "gold_gain", "kl"
# Up to where the area goes. Policies of the embedded world that are worth having lie below it, and the optimum's line from
# 128 Gaussian candidates is 3 % too low there, 1 % at 1 nat; it divides all arms of a seed alike.
KL_MAX = 2.0
TRUSTED = 20.0  # fewest effective candidates a prompt of an optimum that is told without a mark
TILTS = np.geomspace(0.1, 10.0, 25)  # in units of 1 / sd of the gold reward


@dataclass(frozen=True)
class Point:
    """A policy on the plane of reward and KL. gain: over the initial policy, in sd of its reward; kl: nats to it; ess: the
    effective number of candidates a prompt, of all if it was not estimated from candidates.
    """

    gain: float
    kl: float
    ess: float = math.inf

    @property
    def is_trusted(self) -> bool:
        return self.ess >= TRUSTED


def tilt(rewards: np.ndarray, betas: Sequence[float] | np.ndarray) -> list[Point]:
    """The optimum of reward - beta KL for each beta, initial x exp(reward / beta) / Z prompt by prompt (Rafailov et al. 2023,
    equation 4), estimated from the initial policy's own candidates by weighting them; rewards [P, K].

    gain: mean over prompts of the weighted less the plain mean, over the sd of all candidates. kl: mean of
    sum w log(K w). ess: mean of 1 / sum w^2 (Kish 1965). The same beta at every prompt is what maximises the sum over prompts.
    Exact where the K candidates are all that there are and equally likely; else too low by little while ess is large, and
    never above log K nats.
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
    """Best of n samples of the initial policy, by the gold reward; rewards [P, K], n <= K.

    gain: unbiased, the mean maximum over all subsets of n of a prompt's K candidates. kl: log n - (n - 1) / n, which is an
    upper bound (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy"): where rewards tie, or n
    nears the number of likely responses, the true KL is lower.
    """
    from scipy import special

    sd, size = _sd(rewards), rewards.shape[1]
    ordered = np.sort(rewards, 1)
    ranks = np.arange(1, size + 1)
    points = []
    for n in ns:
        if not 1 <= n <= size:
            raise ValueError(f"best of {n}: there are {size} candidates a prompt")
        chances = special.comb(ranks - 1, n - 1) / special.comb(size, n)  # that the maximum is the one of this rank
        gain = float(((ordered * chances).sum(1) - rewards.mean(1)).mean() / sd)
        points.append(Point(gain, math.log(n) - (n - 1) / n))
    return points


def hull(points: Iterable[Point], kl_max: float = KL_MAX) -> list[tuple[float, float]]:
    """The frontier of some policies and the initial one: corners (kl, gain) of the least concave line that never falls and
    lies above them all and above (0, 0), up to kl_max.

    Between two corners lies what choosing one of two policies by chance for every prompt has: the gain lies on the line, the KL
    at most there (it is convex). After the last corner it stays level: a budget need not be spent. A KL that was estimated
    below 0 counts as 0.
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
    """The area under the frontier of `points` over KL from 0 to kl_max, as a share of that under the optimum's."""
    whole = _under(hull(optimum, kl_max))
    if whole <= 0:
        raise ValueError("the optimum gains nothing: all candidates of a prompt have the same reward")
    return _under(hull(points, kl_max)) / whole


def of_arms(collection: RunSet, named: str, seed: int) -> list[Point]:
    """The policies of an arm or of a group. Raises NotMeasured where one of them has no gain or no KL."""
    found = []
    for arm in collection.members(named):
        run = collection.run(arm.name, seed)
        if run is None:
            raise NotMeasured(f"{arm.name}, seed {seed}: missing")
        found.append(Point(run.value(GAIN), run.value(KL)))
    return found


def optimum(collection: RunSet, seed: int) -> list[Point]:
    """The optimum's line of a seed, weakest tilt first, from the candidates of any run of that seed; a kept record holds it
    already. Empty where no run has candidates.
    """
    if "optimum" in collection.record:
        return [Point(*point) for point in collection.record["optimum"].get(str(seed), ())]
    rewards = candidates(collection, seed)
    return [] if rewards is None else tilt(rewards, _sd(rewards) / TILTS)


def candidates(collection: RunSet, seed: int) -> np.ndarray | None:
    """Gold rewards [P, K] of the initial policy's candidates of a seed, of prompts in the order of their keys."""
    for run in collection.runs:
        if run.seed == seed and run.is_done and (found := run.candidates()):
            rewards = np.array([found[key] for key in sorted(found)])
            return rewards if np.ptp(rewards) > 0 else None
    return None


def _sd(rewards: np.ndarray) -> float:
    """Of all candidates, between and within prompts, as gold_gain takes it of samples."""
    return float(rewards.std())


def _under(corners: Sequence[tuple[float, float]]) -> float:
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(corners))


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
