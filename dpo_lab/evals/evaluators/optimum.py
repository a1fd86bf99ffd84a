"""The KL-regularised optimum, estimated from many samples of the initial policy per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.errors import check_at_least
from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, best_of, mean

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

BEST_OF = (4, 16, 64)


@dataclass
class Optimum(Evaluator, name="optimum", order=80, is_default=False, needs_samples=True, needs_reward=True):
    """Rewards of `num_candidates` samples of the initial policy for each of the first `num_prompts` distinct prompts,
    added to the examples: reports compute the KL-regularised optimum from them. They are the same for all runs with
    that initial policy.

    best_of_N/gold, best_of_N/judge: the mean reward of the best of N samples under that reward, for each N of BEST_OF
    up to `num_candidates`; best_of_N/gold_gain, ...: its difference to the mean sample, in standard deviations of all
    candidates. The interval is over prompts.
    """

    labels = {"best_of_16/gold_gain": "gold gain, best of 16 initial"}

    num_candidates: int = 128
    num_prompts: int = 128

    def __post_init__(self) -> None:
        for name, least in (("num_candidates", 2), ("num_prompts", 1)):
            check_at_least(f"evals.optimum.{name}", getattr(self, name), least, 128)

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        keys, rewards = context.candidate_rewards(self.num_prompts, self.num_candidates)
        for name, values in rewards.items():
            context.examples.add("candidates", keys, **{name: values.round(4).tolist()})
            sd = values.std()
            for n in BEST_OF:
                if n <= self.num_candidates:
                    best = best_of(values, n)
                    yield f"best_of_{n}/{name}", mean(best)
                    if sd > 0:
                        yield f"best_of_{n}/{name}_gain", mean((best - values.mean(1)) / sd)
