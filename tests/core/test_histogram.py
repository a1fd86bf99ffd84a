"""Histograms by counts: what numpy counts, whatever the parts, and the same on every rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from dpo_lab.core.histogram import EDGES, Histogram
from tests.support.ranks import run_in_ranks


def test_a_histogram_counts_what_numpy_counts():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64) * 10 ** torch.randint(
        -4, 5, (500,), generator=generator
    )
    values[:3] = torch.tensor([0.0, 1e-3, -1e9])
    whole, parts = Histogram(), Histogram()
    whole.update(values)
    for part in (*values.split(7), torch.tensor([float("nan"), float("inf")]), values[:0]):
        parts.update(part)
    counted = parts.compute()
    expected = [np.sum((values.numpy() > low) & (values.numpy() <= high)) for low, high in pairwise([-np.inf, *EDGES])]
    assert counted.counts == expected
    assert counted == pytest.approx(whole.compute())
    assert (counted.number, counted.least, counted.greatest) == (500, values.min().item(), values.max().item())
    assert (counted.total, counted.squares) == pytest.approx((values.sum().item(), values.square().sum().item()))


def histogram_rank(rank: int, world_size: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    histogram = Histogram()
    histogram.update(torch.arange(7.0)[rank::world_size] - 3)
    print(*histogram.compute())
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_every_rank_gets_the_histogram_of_all():
    alone = Histogram()
    alone.update(torch.arange(7.0) - 3)
    said = " ".join(str(value) for value in alone.compute())
    assert [output.strip() for output in run_in_ranks("tests.core.test_histogram", "histogram_rank", 2)] == [said, said]
