"""The KL-regularised optimum, estimated from many samples of the initial policy per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.errors import check_at_least
from dpo_lab.stats.estimates import Estimate, mean

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

BEST_OF = (4, 16, 64)


@dataclass
class Optimum:
    """Rewards of `candidates` samples of the initial policy for each of the first `prompts` distinct prompts, added to
    the examples: reports compute the KL-regularised optimum from them. They are the same for all runs with that initial
    policy.

    best_of_N/gold, best_of_N/judge: the mean reward of the best of N samples under that reward, for each N of BEST_OF
    up to `candidates`; best_of_N/gold_gain, ...: its difference to the mean sample, in standard deviations of all
    candidates. The interval is over prompts.
    """

    candidates: int = 128
    prompts: int = 128

    def __post_init__(self) -> None:
        for name, least in (("candidates", 2), ("prompts", 1)):
            check_at_least(f"evals.optimum.{name}", getattr(self, name), least, 128)

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        keys, rewards = context.candidate_rewards(self.prompts, self.candidates)
        for name, values in rewards.items():
            context.examples.keep("candidates", keys, **{name: values.round(4).tolist()})
            sd = values.std()
            for n in BEST_OF:
                if n <= self.candidates:
                    best = best_of(values, n)
                    yield f"best_of_{n}/{name}", mean(best)
                    if sd > 0:
                        yield f"best_of_{n}/{name}_gain", mean((best - values.mean(1)) / sd)


def best_of(values: np.ndarray, n: int) -> np.ndarray:
    """Return an unbiased estimate of the expected maximum of n independent draws, [P], from K draws, values [P, K].

    It is the mean of the maximum over all subsets of n of the K draws; the j-th lowest of K, j from 0, is the maximum
    of C(j, n - 1) subsets.
    """
    count = values.shape[1]
    weights = np.array([comb(j, n - 1) / comb(count, n) for j in range(count)])
    return np.sort(values, axis=1) @ weights
