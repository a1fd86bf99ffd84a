"""Likelihood displacement: whether the log-probability of chosen responses fell while the margin grew, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean_by_group, share_by_group

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Displacement(Evaluator, name="displacement", order=30, is_default=True, needs_samples=False, needs_reward=False):
    """Share of held-out pairs whose chosen response is less likely than under the initial policy, and the mean change
    of log-probability, in nats, of chosen and of rejected responses, desirable and undesirable ones that were labelled on
    their own included. Razin et al. 2024 (arXiv:2410.08847). Intervals take pairs of one prompt as correlated.
    """

    labels = {
        "chosen_fell": "share of chosen less likely",
        "chosen_change": "  change, chosen (nats)",
        "rejected_change": "  change, rejected (nats)",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        rows = context.held_out_rows
        chosen, rejected = rows.change
        of_chosen, of_rejected = rows.trained.chosen_length.numpy() > 0, rows.trained.rejected_length.numpy() > 0
        if len(chosen):
            yield "chosen_fell", share_by_group(chosen < 0, rows.prompts[of_chosen])
            yield "chosen_change", mean_by_group(chosen, rows.prompts[of_chosen])
        if len(rejected):
            yield "rejected_change", mean_by_group(rejected, rows.prompts[of_rejected])
