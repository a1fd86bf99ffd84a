"""The status of a sweep's jobs, read from each job's `run.json` and log; the sweep's lock and its request to stop."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dpo_lab.runs.atomic_write import remove_leftovers, write_atomic
from dpo_lab.runs.redact import redact_text
from dpo_lab.runs.run_record import RunStatus, locked, read_record
from dpo_lab.sweeps.plan import Job

SWEEP = "sweep.json"  # the sweep's own record of its jobs
LOG = "output.log"  # in a job's folder: the output of its process, and lines of the sweep that begin with MARK
MARK = "=== "
ENDINGS = ("done", "failed", "interrupted", "preempted", "stopped")  # the statuses of a job that has ended


class SweepFolder:
    """What a sweep keeps in `path`/.sweep, since it concerns jobs that have no record yet: a lock and a request to stop.

    The lock keeps two sweeps from running the same job. The request is a file, since jobs may run on other machines
    that share only the file system.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stop = path, path / ".sweep" / "stop"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for one sweep. Raise RunRefused, with nothing changed, if another process holds the lock."""
        self._stop.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"{self.path}: another sweep is at work here; wait for it, or type name=another"
        with locked(self._stop.with_name("lock"), refusal):
            self._stop.unlink(missing_ok=True)  # of an earlier sweep
            for path in (self._stop, self.path / SWEEP):
                remove_leftovers(path)
            yield

    def request_stop(self, signum: int) -> None:
        """Ask running jobs to end as if they had received `signum`, and other jobs not to start."""
        write_atomic(self._stop, str(int(signum)))

    def stop_signal(self) -> int | None:
        """Return the signal with which the jobs were asked to stop; None if they were not."""
        return int(self._stop.read_text()) if self._stop.exists() else None


@contextmanager
def open_log(folder: Path) -> Iterator[IO[bytes]]:
    """Open a job's log to append to it. `is_alive` is true until this process and those that inherit the file end."""
    with (folder / LOG).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        yield log


def write_line(log: IO[bytes], text: str) -> None:
    """Write a line of the sweep to a job's log."""
    log.write(f"{MARK}{redact_text(text)}\n".encode())
    log.flush()


def is_alive(folder: Path) -> bool:
    """Return whether a process of the job in `folder` is alive, on any machine; its record can't tell after SIGKILL."""
    if not (folder / LOG).exists():
        return False
    with (folder / LOG).open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job. previous_status: before the sweep; status: as in its record, or `not started`."""

    job: Job
    previous_status: RunStatus
    status: str
    error: str | None = None
    seconds: float | None = None
    log: Path | None = None

    @property
    def word(self) -> str:
        """The status as it is printed: for a job that is done also whether it was resumed or skipped."""
        words = {RunStatus.new: "done", RunStatus.unfinished: "resumed", RunStatus.done: "skipped"}
        return words[self.previous_status] if self.status == "done" else self.status


class StatusReader:
    """Reads how far the jobs of a sweep are, by what has changed in their folders since it was created."""

    def __init__(self, jobs: Sequence[Job], previous: Sequence[RunStatus]) -> None:
        self._jobs = list(zip(jobs, previous, strict=True))
        self._before = {job.folder: (read_record(job.folder), _size(job.folder / LOG)) for job in jobs}
        self._idle = dict.fromkeys(self._before, time.monotonic())  # when each was last seen not started
        self._seconds: dict[Path, float] = {}
        self._done: dict[Path, Outcome] = {}  # whose records need not be read again; other jobs may be requeued

    def outcomes(self, is_over: bool = False) -> list[Outcome]:
        """Return the outcomes of all jobs so far. is_over: the launcher has returned, so a `running` job may be dead."""
        return [self._outcome(job, previous, is_over) for job, previous in self._jobs]

    def _outcome(self, job: Job, previous: RunStatus, is_over: bool) -> Outcome:
        if previous is RunStatus.done:
            return Outcome(job, previous, "done")
        if job.folder in self._done:
            return self._done[job.folder]
        status, error = self._status(job.folder)
        if is_over and status == "running":
            if is_alive(job.folder):
                error = "it is still running; the sweep does not wait for it"
            else:
                status, error = "failed", "the process that ran it was killed"
        if status == "not started":
            self._idle[job.folder] = time.monotonic()
            return Outcome(job, previous, status)
        if status != "running":
            self._seconds.setdefault(job.folder, time.monotonic() - self._idle[job.folder])
        outcome = Outcome(job, previous, status, error, self._seconds.get(job.folder), job.folder / LOG)
        if status == "done":
            self._done[job.folder] = outcome
        return outcome

    def _status(self, folder: Path) -> tuple[str, str | None]:
        """Return status and error as the job's record has them, else as its log does.

        A job that was refused or killed has no record of that, and SFT on an embedded task has no record at all.
        """
        before, size = self._before[folder]
        record = read_record(folder)
        if record is not None and record != before and record["status"] != "running":
            return record["status"], record.get("error")
        if _size(folder / LOG) > size:
            last = tail(folder / LOG)[-1]
            status, _, error = last.removeprefix(MARK).partition(": ")
            return (status, error or None) if last.startswith(MARK) and status in ENDINGS else ("running", None)
        return "not started", None


def tail(path: Path, size: int = 1 << 14) -> list[str]:
    """Return the lines in the last `size` bytes of a text file; an empty list if it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
