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

from dpo_lab.distributed.collectives import all_reduce_max
from dpo_lab.training.torch_setup import release_free_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_earlier: dict[str, int] = {}  # by kind of device: the highest peak before the peak was last set back, bytes


class MemoryTracker:
    """The memory of one training, from before its policy is made until its last step. All ranks have to use it
    together.

    What stood in memory when it was made is not the training's: what SFT and the sampling of pairs left in the same
    process is given back first, and the initial policy, which the evaluation needs, is there already. Code that the
    first step loads counts where nothing loaded it before, some 10 MB: of a policy of that size a peak says little.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, restart_peak(device)
        self.policy_bytes = self.weight_bytes = 0

    def holds(self, policy: nn.Module, reference: nn.Module | None) -> None:
        """Count the weights, before they are cut over ranks: the policy's, and those of the model behind its reference."""
        self.policy_bytes = bytes_of_weights([policy])
        self.weight_bytes = bytes_of_weights([policy] if reference is None else [policy, reference])

    def as_record(self) -> dict[str, Any]:
        """`weights`: of policy and reference together, `peak_growth`: by how much more memory was in use than before at
        the worst moment, of the worst rank, both in units of the policy's own weights, `policy_bytes`. peak_growth
        holds gradients, the optimizer's state and activations too; it is None where the system does not let a peak
        count anew.
        """
        growth = _peak(self.device) - self.before if self.before is not None else -1
        largest = all_reduce_max(growth)
        return {
            "weights": round(self.weight_bytes / self.policy_bytes, 4),
            "peak_growth": round(largest / self.policy_bytes, 2) if largest >= 0 else None,
            "policy_bytes": self.policy_bytes,
        }


def bytes_of_weights(models: Iterable[nn.Module]) -> int:
    """Bytes of all storages that hold the models' parameters, each counted once, whoever shares it."""
    storages = (parameter.untyped_storage() for model in models for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_memory(device: torch.device) -> int:
    """The most memory, bytes, that any rank has used so far: on its GPU, without one of the process. All have to call
    it.
    """
    return all_reduce_max(max(_peak(device), _earlier.get(device.type, 0)))


def resident_peak() -> int:
    """The most memory, bytes, that this process has had resident since its program began, or since `restart_peak`.

    Linux keeps in ru_maxrss what the process that started this one had, too; its own is in /proc.
    """
    if (found := _status("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_peak(device: torch.device) -> int | None:
    """Let the peak count from now; gives what is in use now, bytes, without what was freed. None where it can't."""
    _earlier[device.type] = max(_earlier.get(device.type, 0), _peak(device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    release_free_memory()
    try:
        CLEAR.write_text("5")  # of proc(5): VmHWM becomes VmRSS
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def _status(name: str) -> int | None:
    """A size that the kernel tells of this process, bytes; None where it tells none."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None
