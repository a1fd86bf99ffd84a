"""The largest number of bytes of weights that a process holds, in shards, gathered, and whole."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from dpo_lab.models import sharded_weights

SCAN = 40  # every so many looks all objects of the process are looked through


def bytes_of(weights: Iterable[Any]) -> int:
    """Bytes of the storages of weights; of a sharded one the part that is here."""
    local = [weight._local_tensor if isinstance(weight, DTensor) else weight for weight in weights]
    storages = [tensor.untyped_storage() for tensor in local if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def all_weights() -> list[Tensor]:
    """Every parameter alive in this process: of whole models, shards, and what FSDP gathered."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [tensor for tensor in tensors if isinstance(tensor, torch.nn.Parameter)]


class Peak:
    """The most bytes seen, and the dtypes of gathered weights."""

    def __init__(self) -> None:
        gc.collect()
        self.peak, self.looks, self.shards = bytes_of(all_weights()), 0, 0
        self.groups: set[FSDPParamGroup] = set()
        self.dtypes: set[torch.dtype] = set()

    def look(self, group: FSDPParamGroup) -> None:
        self.looks += 1
        self.groups.add(group)
        gathered = [weight._unsharded_param for weight in group.fsdp_params]
        self.dtypes |= {weight.dtype for weight in gathered}
        weights = all_weights() if self.looks % SCAN == 0 else self._of_groups()
        self.peak = max(self.peak, bytes_of(weights))

    def _of_groups(self) -> Iterator[Any]:
        for group in self.groups:
            for weight in group.fsdp_params:
                yield weight.sharded_param
                if hasattr(weight, "_unsharded_param"):
                    yield weight._unsharded_param


@contextmanager
def peak_weights() -> Iterator[Peak]:
    """Inside it `peak` of what it yields is the most that was held whenever FSDP had gathered a unit, or a rank had got
    SCAN / 4 shards more.
    """
    seen, gather, take = Peak(), FSDPParamGroup.wait_for_unshard, sharded_weights._parameter

    def and_look(group: FSDPParamGroup) -> None:
        gather(group)
        seen.look(group)

    def and_scan(local: Tensor, like: DTensor) -> torch.nn.Parameter:
        seen.shards += 1
        if seen.shards % (SCAN // 4) == 0:
            seen.peak = max(seen.peak, bytes_of(all_weights()))
        return take(local, like)

    looking = patch.object(FSDPParamGroup, "wait_for_unshard", and_look)
    with looking, patch.object(sharded_weights, "_parameter", and_scan):
        yield seen
    seen.groups.clear()
    gc.collect()
    seen.peak = max(seen.peak, bytes_of(all_weights()))
