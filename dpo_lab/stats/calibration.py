"""Calibration of probabilities given to labels: the reliability curve and its expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # default


@dataclass(frozen=True)
class Reliability:
    """The non-empty bins of equal width, each attribute [B]: lower edge, mean probability, share of predictions that
    came true, and share of all predictions.
    """

    edge: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray
    share: np.ndarray

    @property
    def error(self) -> float:
        """Return the expected calibration error: mean |frequency - probability|, weighted by the bins' shares."""
        return float(np.sum(np.abs(self.frequency - self.probability) * self.share))


def reliability(label: np.ndarray, bins: int) -> Reliability:
    """Return the reliability curve of the probabilities `label` [N] given to the labels of N pairs.

    A pair gives two predictions: probability `label` for the labelled response, which comes true, and 1 - `label` for
    the other one, which does not. Otherwise every prediction would come true, and always predicting 1 would be
    perfectly calibrated.
    """
    predicted, came_true = np.concatenate((label, 1 - label)), np.repeat((1.0, 0.0), len(label))
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    filled = count > 0
    probability, frequency = (
        np.bincount(bin_of, weights, bins)[filled] / count[filled] for weights in (predicted, came_true)
    )
    return Reliability(edges[:-1][filled], probability, frequency, count[filled] / count.sum())
