"""Set torch up in this process: threads, denormals, the allocator, and the store at which ranks meet."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from dpo_lab.distributed.supervisor import STORE

_opened: list[TCPStore] = []  # keeps the stores open until the process ends
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _MADV_HUGEPAGE = -1, -4, 14  # from <malloc.h> and <sys/mman.h>
_HEAP = 2**30  # bytes that malloc gets in huge pages; it must be below what it keeps, 2**31


def setup_torch(threads: int | None, on_cpu: bool) -> None:
    """Configure torch; call it before anything is computed. threads: intra-op threads (None: torch's default)."""
    torch.set_flush_denormal(True)  # gradients of well-learned pairs are denormal, which takes a CPU 4 times as long
    if threads:
        torch.set_num_threads(threads)
    if on_cpu:
        keep_memory()
    if STORE in os.environ:
        open_store(int(os.environ["MASTER_PORT"]), int(os.environ[STORE]))


def set_up_device(strategy: Strategy) -> None:
    """Initialise the strategy's device and make it the current one; call it before anything uses the device.

    Lightning does so when fit starts, after the reference is computed and memory is measured. On a CPU it does nothing.
    """
    assert strategy.accelerator is not None
    strategy.accelerator.setup_device(strategy.root_device)
    if strategy.root_device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN prepares a plan for each new shape, and here most are new


def open_store(port: int, listener: int) -> None:
    """Open the rendezvous store of the ranks on a listening socket; torch's own would listen on all interfaces."""
    _opened.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener))


def keep_memory() -> bool:
    """Let malloc keep freed memory, as torch does on a GPU, and take it in huge pages; return False if the C library does
    not support it (not glibc).

    By default every large tensor is mapped from the kernel, zeroed page by page, and unmapped again, in every
    micro-batch. Do not use it in a process that loads a model and moves it to a GPU: it would keep the memory of the
    model.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if not (mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
        return False
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    start = libc.sbrk(ctypes.c_ssize_t(0))
    if block := libc.malloc(ctypes.c_size_t(_HEAP)):  # extends the heap; nothing is resident before it is written to
        libc.free(ctypes.c_void_p(block))
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = libc.sbrk(ctypes.c_ssize_t(0)) - first
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return True


def release_free_memory() -> None:
    """Return freed memory to the system once; does nothing if the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
