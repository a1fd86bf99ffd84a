"""Calibration: of the pairs whose label the policy gives a probability p, does the label come true in p?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.results.estimates import Estimate

if TYPE_CHECKING:
    from dpo_lab.evals.subject import Subject


@dataclass
class Calibration:
    """Expected calibration error of sigma(margin of the implicit reward) on held-out pairs, over `bins` of equal width.

    The implicit reward is beta times the log-ratio to the initial policy, as the loss forms it. Each pair is seen from both
    sides, p that the label's side is preferred and 1 - p that the other is: else every label would be a yes, and a policy
    that says 1 of everything would be perfect. An error over few pairs a bin is too large by chance; no interval is known.
    A loss that beta has no say in gives no probability, and nothing is measured.
    """

    bins: int = 15

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(
                f"evals.calibration.bins={self.bins}: must be 1 or more; type e.g. evals.calibration.bins=15"
            )

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        if not subject.loss.rates_pairs:
            return
        import torch
        from torchmetrics.functional.classification import binary_calibration_error

        held_out = subject.held_out
        p = torch.from_numpy(held_out.rewards(subject.loss)).sigmoid()
        subject.examples.keep("held_out", held_out.keys, probability=p)
        said, came_true = torch.cat((p, 1 - p)), torch.cat((torch.ones_like(p), torch.zeros_like(p))).long()
        curve = reliability(said.numpy(), came_true.numpy(), self.bins)
        subject.examples.keep("bin", [f"{edge:.4f}" for edge in curve.pop("edge")], **curve)
        yield "calibration_error", Estimate(binary_calibration_error(said, came_true, self.bins).item(), n=len(p))


def reliability(said: np.ndarray, came_true: np.ndarray, bins: int) -> dict[str, np.ndarray]:
    """The curve: of each bin that holds something its lower edge, the mean probability said [N], the share of it that came
    true [N], and its share of all.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, said, side="right") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    there = count > 0
    sums = (np.bincount(bin_of, weights, bins)[there] for weights in (said, came_true))
    probability, frequency = (total / count[there] for total in sums)
    return {
        "edge": edges[:-1][there],
        "probability": probability,
        "frequency": frequency,
        "share": count[there] / count.sum(),
    }
