"""How a process computes: its threads, denormals flushed, memory kept between the steps of a CPU run."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def set_up_process(threads: int | None, on_cpu: bool) -> None:
    """Call before anything is computed. threads: torch's intra-op threads (none: its own choice)."""
    torch.set_flush_denormal(True)  # a pair learned long ago has gradients so small that a CPU takes 4 times as long
    if threads:
        torch.set_num_threads(threads)
    if on_cpu:
        keep_memory()


def keep_memory() -> bool:
    """Let this process keep what it frees, as torch does on a GPU; False where the C library can't (not glibc).

    By default every large tensor comes from the kernel and goes back to it, zeroed page by page, in every micro-batch.
    Not for a process that loads a model and hands it to a GPU: it would hold the model's room for good.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_memory() -> None:
    """Let the system have, once, what this process has freed and kept; nothing happens where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
