"""Processes of ours: the variables that make a process a rank, a death with the parent, a stop that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

# What tells a process that it is a rank; none of it may leak from one run into another's processes.
DDP_VARIABLES = frozenset(
    "MASTER_ADDR MASTER_PORT NODE_RANK LOCAL_RANK RANK WORLD_SIZE GROUP_RANK LOCAL_WORLD_SIZE PL_GLOBAL_SEED".split()
)


def die_with_parent(signum: int) -> None:
    """Ask the kernel to send this process `signum` when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG


def stop(process: subprocess.Popen, signum: int, grace: float) -> None:
    """Send `signum` to a process that leads a session of its own, wait `grace` seconds, then kill all that is left of it."""
    if process.poll() is None:
        process.send_signal(signum)  # the leader alone: it stops its ranks itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
