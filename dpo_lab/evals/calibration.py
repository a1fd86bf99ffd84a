"""Calibration: of the pairs whose label the policy gives probability p, is the label right in a share p?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.stats.calibration import BINS, reliability
from dpo_lab.stats.estimates import Estimate

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class Calibration:
    """Expected calibration error of the probabilities that the loss gives to labels of held-out pairs, over `bins` bins.

    The probability of a label is sigma(beta h), where h is the log-ratio margin that the loss compares: to its own reference,
    summed or a token, without a target margin (SimPO's gamma). An error over few pairs a bin is too large by chance; no
    interval is known. A loss that beta has no say in gives no probability, and nothing is measured.
    """

    bins: int = BINS

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(
                f"evals.calibration.bins={self.bins}: must be 1 or more; type e.g. evals.calibration.bins=15"
            )

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if not subject.loss.rates_pairs:
            return
        import torch

        held_out = subject.held_out
        label = torch.from_numpy(held_out.rewards(subject.loss)).sigmoid().numpy()
        subject.examples.keep("held_out", held_out.keys, probability=label)
        curve = reliability(label, self.bins)
        columns = {"probability": curve.probability, "frequency": curve.frequency, "share": curve.share}
        subject.examples.keep("bin", [f"{edge:.4f}" for edge in curve.edge], **columns)
        yield "calibration_error", Estimate(curve.error, n=len(label))
