"""The KL-regularised optimum, estimated from many samples of the initial policy per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.stats.estimates import Estimate, mean

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

BEST_OF = (4, 16, 64)


@dataclass
class Optimum:
    """The rewards of `candidates` samples of the initial policy for each of the first `prompts` distinct prompts: kept as
    examples, for whoever tilts them by a reward or takes the best of some. They are the same for every run that starts there.

    best_of_N/gold, best_of_N/judge: the mean reward of the best of N samples by that very reward, for N of BEST_OF as far as
    there are candidates; best_of_N/gold_gain, ...: over the mean sample, in standard deviations of all candidates. The
    interval is over prompts.
    """

    candidates: int = 128
    prompts: int = 128

    def __post_init__(self) -> None:
        for name, least in (("candidates", 2), ("prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"evals.optimum.{name}={getattr(self, name)}: must be {least} or more; type e.g. evals.optimum.{name}=128"
                )

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        keys, rewards = subject.candidate_rewards(self.prompts, self.candidates)
        for name, values in rewards.items():
            subject.examples.keep("candidates", keys, **{name: values.round(4).tolist()})
            sd = values.std()
            for n in BEST_OF:
                if n <= self.candidates:
                    best = best_of(values, n)
                    yield f"best_of_{n}/{name}", mean(best)
                    if sd > 0:
                        yield f"best_of_{n}/{name}_gain", mean((best - values.mean(1)) / sd)


def best_of(values: np.ndarray, n: int) -> np.ndarray:
    """The expected highest of n independent draws, [P], estimated without bias from K draws, values [P, K]: its mean over all
    n of the K. The j-th lowest of K, j from 0, is the highest of C(j, n - 1) such sets.
    """
    count = values.shape[1]
    weights = np.array([comb(j, n - 1) / comb(count, n) for j in range(count)])
    return np.sort(values, axis=1) @ weights
