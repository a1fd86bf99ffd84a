"""Collectives over the ranks of a run: work divided over ranks and gathered in order, gathered or broadcast objects, maxima."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import distributed

P = TypeVar("P")
R = TypeVar("R")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def balance_by_size(sizes: Sequence[float], world_size: int) -> list[int]:
    """Return the rank that computes each part: parts are assigned from the largest on, each to the least loaded rank.

    >>> balance_by_size([1, 5, 2, 3], 2)
    [0, 0, 1, 1]
    """
    loads = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(sizes)
    for part in sorted(range(len(sizes)), key=lambda part: -sizes[part]):
        load, rank = heapq.heappop(loads)
        owners[part] = rank
        heapq.heappush(loads, (load + sizes[part], rank))
    return owners


def map_across_ranks(
    parts: Sequence[P],
    sizes: Sequence[float],
    compute: Callable[[P], R],
    own: AbstractContextManager = nullcontext(),  # noqa: B008
) -> list[R]:
    """Return compute(part) of every part, in order, on every rank; each part is computed by one rank.

    A collective: all ranks have to call it, with equal parts. sizes: the work of each part. A part is the input of one
    forward pass; if the parts do not depend on the number of ranks, results are bit for bit those of one process.
    own: the context in which this rank computes its parts. Results are pickled and should be on the CPU. An exception
    is raised on its rank only; the launcher then ends the other ranks.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return [compute(part) for part in parts]
    owners = balance_by_size(sizes, world_size)
    with own:
        local = {index: compute(parts[index]) for index, owner in enumerate(owners) if owner == rank}
    gathered = all_gather_object(local)
    return [gathered[owner][index] for index, owner in enumerate(owners)]


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks. A collective: all ranks have to call it."""
    if rank_and_world_size()[1] == 1:
        return [value]
    values: list[Any] = [None] * rank_and_world_size()[1]
    distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: R) -> R:
    """Return rank 0's value on every rank. A collective: all ranks have to call it."""
    if rank_and_world_size()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_max(number: int, device: torch.device | None = None) -> int:
    """Return the largest of the ranks' numbers. A collective.

    device: one that the group's backend supports (NCCL: only GPUs); None: the number is gathered as an object, for which
    torch chooses the device, in two collectives.
    """
    if device is None or rank_and_world_size()[1] == 1:
        return max(all_gather_object(number))
    largest = torch.tensor(number, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
