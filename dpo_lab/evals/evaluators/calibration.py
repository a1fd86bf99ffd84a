"""Calibration: of the pairs whose label the policy gives probability p, is the label right in a share p?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.errors import check_at_least
from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.calibration import BINS, reliability
from dpo_lab.stats.estimates import Estimate

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Calibration(Evaluator, name="calibration", order=20, is_default=True, needs_samples=False, needs_reward=False):
    """Expected calibration error, over `bins` bins, of the loss's probabilities of the labels of held-out pairs.

    The probability of a label is sigma(beta h), where h is the log-ratio margin that the loss compares: to its own
    reference, summed or per token, without a target margin (SimPO's gamma). With few pairs per bin the error is biased
    upwards; no interval is estimated. A loss that does not depend on beta defines no probability, and nothing is
    measured.
    """

    labels = {"calibration_error": "calibration error"}

    bins: int = BINS

    def __post_init__(self) -> None:
        check_at_least("evals.calibration.bins", self.bins, 1, 15)

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if not context.loss.is_bradley_terry or not len(context.held_out):
            return
        import torch

        held_out = context.held_out
        probability = torch.from_numpy(held_out.rewards(context.loss)).sigmoid().numpy()
        context.examples.add("held_out", held_out.keys, probability=probability)
        curve = reliability(probability, self.bins)
        columns = {"probability": curve.probability, "frequency": curve.frequency, "share": curve.share}
        context.examples.add("bin", [f"{edge:.4f}" for edge in curve.edge], **columns)
        yield "calibration_error", Estimate(curve.error, n=len(probability))
