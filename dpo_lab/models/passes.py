"""What ranks do together: forward passes divided over them, with a progress bar on rank 0, and files of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dpo_lab.distributed.collectives import P, R, broadcast_object, map_across_ranks, rank_and_world_size
from dpo_lab.models.sharding import own_passes
from dpo_lab.runs.atomic_write import atomic_path
from dpo_lab.runs.cache import is_intact, write_checksum
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


def cached_by_ranks(path: Path | None, make: Callable[[], bytes]) -> bytes:
    """Return the content of the file `path`; if it is missing or damaged, all ranks `make` it together, and rank 0
    writes it.

    A collective: all ranks have to call it, and `make` may run collectives. Of several runs one makes the file while the
    others wait. path: None stores nothing.
    """
    own = path if rank_and_world_size()[0] == 0 else None  # the file that this rank reads and writes
    if own is not None:
        own.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{own}.lock") if own is not None else nullcontext():
        content = broadcast_object(own.read_bytes() if own is not None and is_intact(own) else None)
        if content is None:
            content = make()
            if own is not None:
                with atomic_path(own) as beside:
                    beside.write_bytes(content)
                write_checksum(own)
    return content
