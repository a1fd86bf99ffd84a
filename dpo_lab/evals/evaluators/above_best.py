"""The share of samples whose gold reward is above the best hundredth of the initial policy's samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

BEST = 0.99


@dataclass
class AboveBest(Evaluator, name="above_best", order=55, is_default=False, needs_samples=True, needs_reward=True):
    """Share of samples with a gold reward above the 99th percentile of the initial policy's samples, of both policies.

    Methods that sample measure it by default: with offline pairs of the initial policy few responses are better. The
    interval takes the percentile, of as many samples as evals.num_prompts, for known.
    """

    labels = {"above_best": "above initial's best 1 %"}

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if "gold" not in context.rewards:
            return
        trained, initial = context.rewards["gold"]
        best = float(np.quantile(initial, BEST))
        for prefix, rewards in (("", trained), ("initial/", initial)):
            yield f"{prefix}above_best", share(list(rewards > best))
