"""Set torch up in this process: threads, denormals, the allocator, and the store at which ranks meet."""

from __future__ import annotations

import ctypes
import os
import socket
import sys

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from dpo_lab.distributed.launcher import STORE

_opened: list[TCPStore] = []  # for as long as the process lives
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def setup_torch(threads: int | None, on_cpu: bool) -> None:
    """Call before anything is computed. threads: torch's intra-op threads (none: its own choice)."""
    torch.set_flush_denormal(True)  # a pair learned long ago has gradients so small that a CPU takes 4 times as long
    if threads:
        torch.set_num_threads(threads)
    if on_cpu:
        keep_memory()
    if os.environ.get(STORE) and os.environ["RANK"] == "0":
        open_store(int(os.environ["MASTER_PORT"]))


def set_up_device(strategy: Strategy) -> None:
    """Make the strategy's device this process's own and initialise it. Call before anything else asks for it.

    Lightning does so when a fit starts, too late here: the reference is computed, and memory counted, before. On the
    CPU nothing happens.
    """
    assert strategy.accelerator is not None
    strategy.accelerator.setup_device(strategy.root_device)


def open_store(port: int) -> None:
    """Open what the ranks of this machine meet at, to this machine alone: torch itself would open it to all networks."""
    with socket.socket() as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        here.bind(("127.0.0.1", port))
        here.listen()
        _opened.append(
            TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=here.detach())
        )


def keep_memory() -> bool:
    """Let this process keep what it frees, as torch does on a GPU; False where the C library can't (not glibc).

    By default every large tensor comes from the kernel and goes back to it, zeroed page by page, in every micro-batch.
    Not for a process that loads a model and hands it to a GPU: it would hold the model's room for good.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def release_free_memory() -> None:
    """Let the system have, once, what this process has freed and kept; nothing happens where the C library is not
    glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
