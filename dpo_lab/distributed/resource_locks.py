"""Locks on what runs on one machine share: GPUs, ports and a share of the CPUs, by file locks that the kernel frees."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# Below the ports that the kernel hands out by itself, so that none is taken between the lease and the start of its user.
PORTS = range(20000, 30000)


def visible_gpus() -> list[str] | None:
    """The GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them; None where nothing can tell."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        end = next(
            (i for i, name in enumerate(names) if name in ("", "-1")), len(names)
        )  # CUDA itself reads no further
        return names[:end]
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE) if listed.returncode == 0 else None


@contextmanager
def acquire_gpus(count: int, poll: float = 0.2) -> Iterator[list[str] | None]:
    """Hold `count` of the visible GPUs, named as CUDA_VISIBLE_DEVICES takes them; None for a count of 0.

    All or nothing: while others hold too many of them it keeps none and tries again every `poll` seconds. Raises ValueError
    when the machine has fewer than `count`.
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
    folder, told = _folder(), False
    with ExitStack() as held:
        while (leased := _try_gpus(folder, gpus, count, held)) is None:
            if not told:
                log.info("waiting for %d of the GPUs %s to be free: other runs hold them", count, ",".join(gpus))
                told = True
            time.sleep(poll)
        yield leased


def _try_gpus(folder: Path, gpus: list[str], count: int, held: ExitStack) -> list[str] | None:
    """`count` of the GPUs, locked until `held` closes; None, and no lock kept, where fewer are free."""
    with ExitStack() as trying:
        trying.enter_context(FileLock(folder / "gpus.lock"))  # one at a time: two halves never block each other
        leased, locks = [], trying.enter_context(ExitStack())
        for gpu in gpus:
            if _take(folder / ("gpu-" + re.sub(r"[^-\w]", "_", gpu) + ".lock"), locks):
                leased.append(gpu)
            if len(leased) == count:
                held.push(locks.pop_all())
                return leased
    return None


@contextmanager
def acquire_port() -> Iterator[int]:
    """Hold a TCP port that nobody listens on. No other lease of this user gets it meanwhile. Raises OSError if none is free."""
    folder = _folder()
    with ExitStack() as held:
        for port in random.SystemRandom().sample(PORTS, 200):  # the seeded generators are the experiments'
            if _take(folder / f"port-{port}.lock", held) and _is_free(port):
                break
        else:
            raise OSError(f"no free TCP port found between {PORTS.start} and {PORTS.stop}; end what listens on them")
        yield port


def threads_per_job(cells: int) -> int:
    """Threads that each of `cells` runs side by side may use, at least 1: its share of the CPUs this process may use."""
    counts: list[float] = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    counts += _quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, int(min(counts)) // cells)


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    """CPUs that the process's control groups allow it (versions 1 and 2), where they set a limit."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for controllers, group in (line.split(":", 2)[1:] for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = Path(controllers and "cpu") / group.lstrip("/")
        for folder in (root / place, *(root / parent for parent in place.parents)):  # a limit above holds below
            try:
                if controllers:
                    quota, period = (
                        (folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period")
                    )
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _take(path: Path, held: ExitStack) -> bool:
    """Lock `path` until `held` closes, unless somebody else has it. Started processes don't inherit the lock."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    held.callback(lock.release)
    return True


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False


def _folder() -> Path:
    """Where this user's locks lie; no one else can write there. Raises PermissionError where someone else could."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"dpo_lab-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of yours alone; remove it, or set TMPDIR to another folder")
    return folder
