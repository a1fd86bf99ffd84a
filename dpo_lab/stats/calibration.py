"""Calibration of probabilities given to labels: the reliability curve and its expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # unless told otherwise


@dataclass(frozen=True)
class Reliability:
    """The bins of equal width that hold something: lower edge, mean probability, share of labels that came true, share of all.

    Every column [B].
    """

    edge: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray
    share: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap between probability and frequency, weighted by the bins' shares."""
        return float(np.sum(np.abs(self.frequency - self.probability) * self.share))


def reliability(label: np.ndarray, bins: int) -> Reliability:
    """Bin the probabilities that were given to the labels of N pairs [N], each pair seen from both sides.

    A pair gives two predictions: `label` that the labelled side is preferred, which is true, and 1 - `label` that the other
    one is, which is false. Else every prediction would come true, and always saying 1 would be perfectly calibrated.
    """
    said, came_true = np.concatenate((label, 1 - label)), np.repeat((1.0, 0.0), len(label))
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, said, side="right") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    there = count > 0
    probability, frequency = (np.bincount(bin_of, weights, bins)[there] / count[there] for weights in (said, came_true))
    return Reliability(edges[:-1][there], probability, frequency, count[there] / count.sum())
