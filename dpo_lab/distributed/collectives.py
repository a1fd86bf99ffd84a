"""Collectives over the ranks of a run: work divided over ranks and gathered in order, gathered objects, maxima."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

P = TypeVar("P")
R = TypeVar("R")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number among the ranks that compute together, and how many they are; (0, 1) where it is alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def balance_by_size(sizes: Sequence[float], world_size: int) -> list[int]:
    """Which rank computes each part: the largest first, each to the rank that has the least so far.

    >>> deal([1, 5, 2, 3], 2)
    [0, 0, 1, 1]
    """
    loads = [(0.0, rank) for rank in range(world_size)]
    dealt = [0] * len(sizes)
    for part in sorted(range(len(sizes)), key=lambda part: -sizes[part]):
        load, rank = heapq.heappop(loads)
        dealt[part] = rank
        heapq.heappush(loads, (load + sizes[part], rank))
    return dealt


def map_local(parts: Sequence[P], sizes: Sequence[float], compute: Callable[[P], R]) -> list[R]:
    """compute(part) of every part, all by this process."""
    return [compute(part) for part in parts]


def map_across_ranks(parts: Sequence[P], sizes: Sequence[float], compute: Callable[[P], R]) -> list[R]:
    """compute(part) of every part, in order, on every rank; each part is computed by one of them.

    All ranks have to call it, with equal parts; sizes: how much work each is. A part is what a forward sees: cut without a
    look at the number of ranks, it is computed to the last bit as it would be by one process. Results travel pickled: let
    them be on the CPU. What one rank raises, it raises alone: who started the ranks ends the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return map_local(parts, sizes, compute)
    dealt = balance_by_size(sizes, world_size)
    mine = {place: compute(parts[place]) for place, to in enumerate(dealt) if to == rank}
    gathered = all_gather_object(mine)
    return [gathered[to][place] for place, to in enumerate(dealt)]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks; all have to call it together."""
    if rank_and_world_size()[1] == 1:
        return [value]
    values: list[Any] = [None] * rank_and_world_size()[1]
    distributed.all_gather_object(values, value)
    return values


def all_reduce_max(number: int) -> int:
    """The largest of the ranks' numbers.

    It travels as an object, for which torch takes the device that the group's backend serves: NCCL has none but GPUs.
    """
    return max(all_gather_object(number))
