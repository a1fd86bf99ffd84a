"""Rewards of samples: the gold reward where the task has one, and the judge's scores where there is a judge."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Reward(Evaluator, name="reward", order=50, is_default=True, needs_samples=True, needs_reward=True):
    """Mean reward of the trained and of the initial policy's samples: `gold` is the reward of the task, `judge` the
    score.

    gold_gain, judge_gain: the mean difference per prompt, in standard deviations of the initial policy's rewards.
    """

    labels = {
        "gold": "gold reward",
        "gold_gain": "  gain, in sd of initial",
        "judge": "judge score",
        "judge_gain": "  gain, in sd of initial",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        for name, (trained, initial) in context.rewards.items():
            context.examples.add("prompt", context.prompt_keys, **{name: trained, f"initial_{name}": initial})
            yield name, mean(trained)
            yield f"initial/{name}", mean(initial)
            if sd := statistics.pstdev(initial.tolist()):
                yield f"{name}_gain", mean((trained - initial) / sd)
