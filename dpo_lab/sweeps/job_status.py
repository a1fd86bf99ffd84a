"""Status files of a sweep's jobs, in `.sweep`: the sweep's lock, a status per job, and the request to stop."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_lab.runs.atomic_write import remove_leftovers, write_atomic
from dpo_lab.runs.run_record import RunRefused

SWEEP = "sweep.json"  # the sweep's own record of its jobs


class JobStatusStore:
    """The files in `folder`/.sweep, by which a sweep and the processes that run its jobs communicate, on any machine.

    A status entry describes a job's last attempt: `status` (running, done, failed, interrupted, preempted or requeued),
    `error`, `seconds`, `log`, and `host` and `pid` of the process that supervises it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder / ".sweep"
        self._stop = self._root / "stop"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder for one sweep. Raise RunRefused, with nothing changed, if another process holds the lock."""
        self._root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._root / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunRefused(
                f"{self.folder}: another sweep is at work here; wait for it, or type name=another"
            ) from None
        try:
            self._stop.unlink(missing_ok=True)  # of an earlier sweep
            for path in (self._stop, self.folder / SWEEP):
                remove_leftovers(path)
            yield
        finally:
            lock.release()

    def ask_to_stop(self, signum: int) -> None:
        """Ask running jobs to end as if they had received `signum`, and other jobs not to start."""
        write_atomic(self._stop, str(int(signum)))

    def asked_to_stop(self) -> int | None:
        """Return the signal with which the jobs were asked to stop; None if they were not."""
        try:
            return int(self._stop.read_text())
        except FileNotFoundError:
            return None

    def note(self, run: Path, **entries: Any) -> None:
        """Write the status entry of the job in the folder `run`."""
        self._path(run).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(run), json.dumps(entries))

    def read(self, run: Path) -> dict[str, Any] | None:
        """Return the status entry of the job in the folder `run`; None if it never started."""
        try:
            return json.loads(self._path(run).read_text())
        except FileNotFoundError:
            return None

    def forget(self, run: Path) -> None:
        """Remove the status entry of the job in the folder `run`."""
        remove_leftovers(self._path(run))
        self._path(run).unlink(missing_ok=True)

    def _path(self, run: Path) -> Path:
        relative = os.path.relpath(run, self.folder)
        return self._root / "cells" / f"{hashlib.blake2b(relative.encode(), digest_size=12).hexdigest()}.json"


def whereabouts() -> dict[str, Any]:
    """Return host and process id of this process, for a status entry."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def is_process_dead(note: Mapping[str, Any]) -> bool | None:
    """Return whether the process that wrote a status entry has ended; None if it is on another machine."""
    if note["host"] != socket.gethostname():
        return None
    try:
        os.kill(note["pid"], 0)
    except ProcessLookupError:
        return True
    return False


def tail(path: Path, size: int = 1 << 14) -> list[str]:
    """Return the lines in the last `size` bytes of a text file; an empty list if it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
