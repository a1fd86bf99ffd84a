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

SWEEP = "sweep.json"  # what the sweep itself keeps of its cells


class JobStatusStore:
    """`folder`/.sweep, through which the sweep and the processes that run its cells, wherever they are, hear of each other.

    A note is what is known of one cell's latest start: `status` (running, done, failed, interrupted, preempted or requeued),
    `error`, `seconds`, `log`, and the `host` and `pid` of the process that sees to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder / ".sweep"
        self._stop = self._root / "stop"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder as its one sweep. Raises RunRefused while another process does, and touches nothing then."""
        self._root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._root / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunRefused(
                f"{self.folder}: another sweep is at work here; wait for it, or type name=another"
            ) from None
        try:
            self._stop.unlink(missing_ok=True)  # of a sweep that is over
            for path in (self._stop, self.folder / SWEEP):
                remove_leftovers(path)
            yield
        finally:
            lock.release()

    def ask_to_stop(self, signum: int) -> None:
        """Ask the cells that run to end as if they had been sent `signum`, and the others not to begin."""
        write_atomic(self._stop, str(int(signum)))

    def asked_to_stop(self) -> int | None:
        """The signal that the cells were asked to stop for."""
        try:
            return int(self._stop.read_text())
        except FileNotFoundError:
            return None

    def note(self, run: Path, **entries: Any) -> None:
        self._note(run).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._note(run), json.dumps(entries))

    def read(self, run: Path) -> dict[str, Any] | None:
        """The note on the cell whose run lies in `run`; None where it never started."""
        try:
            return json.loads(self._note(run).read_text())
        except FileNotFoundError:
            return None

    def forget(self, run: Path) -> None:
        remove_leftovers(self._note(run))
        self._note(run).unlink(missing_ok=True)

    def _note(self, run: Path) -> Path:
        inside = os.path.relpath(run, self.folder)
        return self._root / "cells" / f"{hashlib.blake2b(inside.encode(), digest_size=12).hexdigest()}.json"


def whereabouts() -> dict[str, Any]:
    """What a note says of the process that writes it."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def is_process_dead(note: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote the note is no more; None where it is of another machine, which can't be told."""
    if note["host"] != socket.gethostname():
        return None
    try:
        os.kill(note["pid"], 0)
    except ProcessLookupError:
        return True
    return False


def tail(path: Path, size: int = 1 << 14) -> list[str]:
    """The last lines of a text file; none where it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def first_line(error: BaseException | str | None) -> str:
    """What an error says in one line."""
    text = str(error or "").strip()
    return text.splitlines()[0] if text else ""
