"""Likelihood displacement: whether the log-probability of chosen responses fell while the margin grew, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.stats.estimates import Estimate, mean, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Displacement:
    """Share of held-out pairs whose chosen response became less probable than under the initial policy, and by how many
    nats both sides' log-probabilities rose on average. Razin et al. 2024 (arXiv:2410.08847).
    """

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        chosen, rejected = subject.held_out.change
        yield "chosen_fell", share(chosen < 0)
        yield "chosen_change", mean(chosen)
        yield "rejected_change", mean(rejected)
