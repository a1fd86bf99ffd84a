"""Measure memory: the weights held in training, and the peak in use, of the process or of its GPU."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dpo_lab.distributed.collectives import all_reduce_max
from dpo_lab.training.torch_setup import release_free_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_earlier: dict[str, int] = {}  # by device type: the highest peak before the last reset, bytes


class MemoryTracker:
    """Measures the memory of training, from before its policy is created until its last step; all ranks have to use it.

    Memory in use when it is created is not counted: free memory that SFT and the sampling of pairs left in the process
    is released first, and the initial policy, which the evaluation needs, is already loaded. Libraries that the first
    step loads are counted, some 10 MB, so the peak means little for a policy of that size.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, restart_peak(device)
        self.policy_bytes = self.weight_bytes = 0

    def count_weights(self, policy: nn.Module, *others: nn.Module | None) -> None:
        """Count the weights of the policy and of the other models that training holds, before they are sharded."""
        self.policy_bytes = bytes_of_weights([policy])
        self.weight_bytes = bytes_of_weights([policy, *(other for other in others if other is not None)])

    def as_record(self) -> dict[str, Any]:
        """Return the entry of the run record, in units of the size of the policy's weights, `policy_bytes`.

        `weights`: size of the weights of all models that training holds; `peak_growth`: peak memory minus memory before, of the
        rank where it is largest. It includes gradients, optimizer state and activations, and is None if the system
        can't reset the peak.
        """
        growth = current_peak(self.device) - self.before if self.before is not None else -1
        largest = all_reduce_max(growth)
        return {
            "weights": round(self.weight_bytes / self.policy_bytes, 4),
            "peak_growth": round(largest / self.policy_bytes, 2) if largest >= 0 else None,
            "policy_bytes": self.policy_bytes,
        }


def bytes_of_weights(models: Iterable[nn.Module]) -> int:
    """Return the bytes of all storages of the models' parameters, where a shared storage is counted once.

    A sharded parameter counts with all its shards.
    """
    weights = [weight for model in models for weight in model.parameters()]
    whole = [weight.untyped_storage() for weight in weights if not isinstance(weight, DTensor)]
    shards = {id(weight): weight.numel() * weight.element_size() for weight in weights if isinstance(weight, DTensor)}
    return sum({storage.data_ptr(): storage.nbytes() for storage in whole}.values()) + sum(shards.values())


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of all ranks so far, in bytes: of the GPU, or of the process without one; a collective."""
    return all_reduce_max(max(current_peak(device), _earlier.get(device.type, 0)))


def resident_peak() -> int:
    """Return the peak resident memory of this process, in bytes, since its start or since `restart_peak`.

    It is read from /proc if possible: on Linux ru_maxrss includes the peak of the parent process.
    """
    if (peak := _status("VmHWM")) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_peak(device: torch.device) -> int | None:
    """Release free memory, reset the peak and return the bytes in use now; return None if the peak can't be reset."""
    _earlier[device.type] = max(_earlier.get(device.type, 0), current_peak(device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    release_free_memory()
    try:
        CLEAR.write_text("5")  # see proc(5): sets VmHWM to VmRSS
    except OSError:
        return None
    return _status("VmRSS")


def current_peak(device: torch.device) -> int:
    """Return the peak of this rank since `restart_peak`, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def _status(name: str) -> int | None:
    """Return a size from /proc/self/status in bytes, or None."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None
