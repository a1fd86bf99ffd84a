"""Forward passes divided over ranks, with a progress bar on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpo_lab.distributed.collectives import P, R, map_across_ranks, rank_and_world_size
from dpo_lab.models.sharding import own_passes
from dpo_lab.terminal.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def map_passes(
    title: str,
    model: PreTrainedModel | None,
    parts: Sequence[P],
    sizes: Sequence[float],
    compute: Callable[[P], R],
    counts: Sequence[int] | None = None,
    least: float = 0.0,
) -> list[R]:
    """Call map_across_ranks with a progress bar on rank 0, shown if it takes more than `least` seconds.

    model: the one that `compute` runs, which may be sharded; None: none. counts: what the bar counts for each part, by
    default 1. The parts of rank 0 are counted when each is done, those of other ranks at the end.
    """
    counts = [1] * len(parts) if counts is None else counts
    done, indices = 0, range(len(parts))
    with track(title, sum(counts), shown=rank_and_world_size()[0] == 0, least=least) as advance:

        def compute_and_count(index: int) -> R:
            nonlocal done
            result = compute(parts[index])
            done += counts[index]
            advance(counts[index])
            return result

        results = map_across_ranks(indices, sizes, compute_and_count, own_passes(model))
        advance(sum(counts) - done)
    return results
