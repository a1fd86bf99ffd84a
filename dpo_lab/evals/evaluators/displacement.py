"""Likelihood displacement: whether the log-probability of chosen responses fell while the margin grew, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Displacement(Evaluator, name="displacement", order=30, is_default=True, needs_samples=False, needs_reward=False):
    """Share of held-out pairs whose chosen response is less likely than under the initial policy, and the mean change
    of log-probability, in nats, of chosen and of rejected responses, desirable and undesirable ones that were labelled on
    their own included. Razin et al. 2024 (arXiv:2410.08847).
    """

    labels = {
        "chosen_fell": "share of chosen less likely",
        "chosen_change": "  change, chosen (nats)",
        "rejected_change": "  change, rejected (nats)",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        chosen, rejected = context.held_out_rows.change
        if len(chosen):
            yield "chosen_fell", share(chosen < 0)
            yield "chosen_change", mean(chosen)
        if len(rejected):
            yield "rejected_change", mean(rejected)
