"""Histograms of values: counts in fixed buckets, fine near 0 and wide far from it, which add up over batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_lab.core.metrics import FixedDtypeMetric

# Upper edges of buckets, growing by a factor of 1.1 on both sides of one bucket around 0; the last bucket is unbounded.
_POSITIVE = [1e-3 * 1.1**i for i in range(170)]  # to 1e4
EDGES = [*(-edge for edge in reversed(_POSITIVE)), *_POSITIVE, float("inf")]


class HistogramCounts(NamedTuple):
    """The counts of a histogram: values in each bucket of EDGES; their number, range, sum and sum of squares."""

    counts: list[int]
    number: int
    least: float
    greatest: float
    total: float
    squares: float


class Histogram(FixedDtypeMetric):
    """A metric that counts values in buckets, summed over batches and ranks; `compute` returns HistogramCounts.

    Values that are not finite are left out.
    """

    counts: Tensor
    moments: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(len(EDGES), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("moments", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("least", torch.tensor(float("inf"), dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("greatest", torch.tensor(-float("inf"), dtype=torch.float64), dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Count values [B]."""
        values = values[values.isfinite()].double()
        if not len(values):
            return
        edges = torch.tensor(EDGES, dtype=torch.float64, device=values.device)
        self.counts += torch.bincount(torch.bucketize(values, edges), minlength=len(EDGES))
        self.moments += torch.stack((values.sum(), values.square().sum()))
        self.least = torch.minimum(self.least, values.min())
        self.greatest = torch.maximum(self.greatest, values.max())

    def compute(self) -> HistogramCounts:
        counts = self.counts.tolist()
        total, squares = self.moments.tolist()
        return HistogramCounts(counts, sum(counts), self.least.item(), self.greatest.item(), total, squares)
