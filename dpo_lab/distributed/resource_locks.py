"""What runs on one machine share: GPUs, by file locks that the kernel frees, and the CPUs that each may use."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def visible_gpus() -> list[str] | None:
    """Return the GPUs visible to a child process, as CUDA_VISIBLE_DEVICES names them; None if unknown."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        # CUDA ignores what comes after an empty name or -1.
        end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return names[:end]
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE) if listed.returncode == 0 else None


@contextmanager
def acquire_gpus(count: int, poll: float = 0.2) -> Iterator[list[str] | None]:
    """Lock `count` of the visible GPUs and yield their names for CUDA_VISIBLE_DEVICES; None for a count of 0.

    While fewer than `count` are free it locks none and tries again every `poll` seconds. Raises ValueError if fewer
    than `count` are visible.
    """
    if count == 0:
        yield None
        return
    gpus = visible_gpus() or []
    if count > len(gpus):
        raise ValueError(
            f"trainer.devices={count}: only {len(gpus)} GPUs are visible; type trainer.devices={len(gpus)}"
            if gpus
            else f"trainer.devices={count}: no GPU is visible; type trainer=cpu, or set CUDA_VISIBLE_DEVICES"
        )
    folder, is_logged = _folder(), False
    with ExitStack() as stack:
        while (locked := _try_gpus(folder, gpus, count, stack)) is None:
            if not is_logged:
                log.info("waiting for %d of the GPUs %s, which other runs use", count, ",".join(gpus))
                is_logged = True
            time.sleep(poll)
        yield locked


def _try_gpus(folder: Path, gpus: list[str], count: int, stack: ExitStack) -> list[str] | None:
    """Lock `count` of the GPUs until `stack` closes; return None, with none locked, if fewer are free."""
    with ExitStack() as trying:
        # One process at a time, so that two never hold half of what they need.
        trying.enter_context(FileLock(folder / "gpus.lock"))
        locked, locks = [], trying.enter_context(ExitStack())
        for gpu in gpus:
            if _try_lock(folder / ("gpu-" + re.sub(r"[^-\w]", "_", gpu) + ".lock"), locks):
                locked.append(gpu)
            if len(locked) == count:
                stack.push(locks.pop_all())
                return locked
    return None


def threads_per_job(jobs: int) -> int:
    """Return the threads for each of `jobs` parallel runs, at least 1: its share of the CPUs this process may use."""
    import joblib  # only its launcher runs several jobs on this machine

    return max(1, joblib.cpu_count() // jobs)


def _try_lock(path: Path, stack: ExitStack) -> bool:
    """Lock `path` until `stack` closes; return whether it was free. Child processes don't inherit the lock."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    stack.callback(lock.release)
    return True


def _folder() -> Path:
    """Return the folder of this user's locks. Raise PermissionError if other users can access it."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"dpo_lab-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} is a folder that other users own or can access; remove it, or set TMPDIR to another folder"
        )
    return folder
