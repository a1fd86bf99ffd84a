"""Watch the ranks of one run: wait for them, pass signals on, kill what is left, and name the rank that failed first.

torch's elastic agent (torchrun, elastic_launch) was tried instead; rows of docs/faults.md that it does not hold:
7: it kills no ranks at a second signal, and asks the others to stop as soon as one has ended, though it may still save.
9: it gives a stuck rank a fixed 30 seconds, leaves the processes that a rank has started, overwrites the log of the
attempt before, and tells which rank failed first by whole seconds.
45: its store listens on all interfaces.
It also imports torch in a process that only waits.
"""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dpo_lab.distributed.signals import REQUEUE, STOP_SIGNALS, TIME_IS_UP, StopRequest, StopSignal
from dpo_lab.errors import first_line

# Environment variables of a rank.
ERROR_FILE = "DPO_LAB_ERROR_FILE"  # the path of the file in which it reports its error
STORE = "DPO_LAB_STORE"  # rank 0's file descriptor of the socket, bound to 127.0.0.1, on which it opens the store
# Exit codes of a process that was asked to stop.
EXIT_CODES = {code for signum in (*STOP_SIGNALS, TIME_IS_UP) for code in (128 + signum, -signum)}

TERM_TO_KILL_S = 5.0  # seconds from SIGTERM to SIGKILL: all have ended within 10 after one failed or stopped
DEBOUNCE_S = 0.5  # signals so close together are one: `timeout` sends one to the process and one to its group

TAIL = 16_384  # bytes at the end of a log that are read
TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class ExitStatus:
    """How a run of several ranks ended.

    code: 0, or the exit code of the rank that failed first (128 + n if signal n killed it). failed_rank: the number of
    that rank. error: one line for the user, which names it. Both are None if no rank failed.
    """

    code: int
    failed_rank: int | None = None
    error: str | None = None


def report_error(error: str, code: int) -> None:
    """Report to the supervisor why this rank is about to end with exit code `code`, not 0; call it before clean-up.

    The first rank to report counts as the first to fail, however long its clean-up takes. Only the first line of
    `error` is kept. Does nothing without a supervisor or on a full disk.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None or not error.strip() or os.path.exists(path):
        return
    with suppress(OSError):
        Path(path).write_text(f"{time.monotonic()} {code} {first_line(error)}")


def report_stop(stopped: StopSignal) -> None:
    """Report that this rank was asked to stop, before its connections close and peers report those as errors."""
    report_error(f"stopped by {stopped}", stopped.exit_code)


class RepeatableStopRequest(StopRequest):
    """A stop request that also records whether it was repeated (`is_repeated`), which means: kill the ranks now."""

    is_repeated = False
    _first = math.inf

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first > DEBOUNCE_S:
            self.is_repeated = True


@dataclass
class Rank:
    """The process of a rank, which is the leader of a session of its own."""

    number: int
    process: subprocess.Popen
    error_file: Path
    log: IO[bytes] | None  # None for rank 0, which inherits this process's output
    log_start: int  # bytes of the log written by earlier attempts
    wake: int | None  # a file descriptor that becomes readable when the process ends
    code: int | None = None
    ended: float = math.inf  # when it was seen to have ended by itself
    stopped: bool = False  # by the supervisor: its exit code tells nothing about the failure

    def is_running(self) -> bool:
        """Return whether it is running. When it has ended, kill what is left of its session, such as loader workers."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code, self.ended = code, math.inf if self.stopped else time.monotonic()
            self._kill_session()
        return self.code is None

    def stop(self) -> None:
        """Send SIGTERM to the leader, which stops its own processes."""
        self.stopped = True
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the whole session and wait for its end; does nothing if it has ended."""
        if self.is_running():
            self.stopped = True
            self._kill_session()
            self.process.wait()
            self.is_running()

    def _kill_session(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def read_error_file(self) -> tuple[float, int, str] | None:
        """Return time, exit code and message of the error that the rank reported; None if it reported none."""
        try:
            at, code, error = self.error_file.read_text().split(" ", 2)
            return float(at), int(code), error
        except (OSError, ValueError):
            return None

    def end_of_log(self) -> str:
        """Return the end of its log from the first traceback on, or else the last 20 lines."""
        if self.log is None:
            return ""
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.log_start, size - TAIL)
        text = os.pread(self.log.fileno(), size - start, start).decode(errors="replace")
        lines = re.sub(r"^\[rank\d+\]: ?", "", text, flags=re.MULTILINE).splitlines()  # torch's prefix
        first = next((i for i, line in enumerate(lines) if line.endswith(TRACEBACK)), len(lines) - 20)
        return "\n".join(lines[max(0, first) :])


@contextmanager
def start_rank(
    number: int, command: Sequence[str], folder: Path, cwd: Path, variables: dict[str, str]
) -> Iterator[Rank]:
    """Start `command` with these environment variables as rank `number`; kill it when the context ends."""
    error_file = folder.absolute() / f".rank-{number}.error"
    error_file.unlink(missing_ok=True)
    with (folder / f"rank-{number}.log").open("ab+") if number else nullcontext() as log:
        log_start = log.tell() if log else 0
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=variables | {ERROR_FILE: str(error_file)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[int(variables[STORE])] if STORE in variables else [],
        )
        wake = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
        rank = Rank(number, process, error_file, log, log_start, wake)
        try:
            yield rank
        finally:
            rank.kill()
            error_file.unlink(missing_ok=True)
            if wake is not None:
                os.close(wake)


def supervise(ranks: Sequence[Rank], request: RepeatableStopRequest, grace: float) -> None:
    """Wait until all ranks have ended; stop them once one has failed or stopped, or `request` holds a signal."""
    is_forwarded = is_stopping = False
    kill_at = math.inf
    while running := [rank for rank in ranks if rank.is_running()]:
        codes = [rank.code for rank in ranks if rank.code]
        if request.signum is not None and not is_forwarded:
            is_forwarded, kill_at = True, min(kill_at, time.monotonic() + grace)
            for rank in running:
                rank.process.send_signal(signal.SIGTERM if request.signum == REQUEUE else request.signum)
        # Ranks that were asked to stop end one after another, each once it has saved.
        if not is_stopping and any(not (is_forwarded and code in EXIT_CODES) for code in codes):
            is_stopping, kill_at = True, min(kill_at, time.monotonic() + TERM_TO_KILL_S)
            for rank in running:
                rank.stop()
        if request.is_repeated or time.monotonic() >= kill_at:
            for rank in running:
                rank.kill()
                if is_forwarded:
                    line = f"rank {rank.number} had not ended when it was asked to stop, and was killed"
                    print(line, file=sys.stderr)
        select.select([rank.wake for rank in running if rank.wake is not None], [], [], 0.1)  # or until one has ended


def root_cause(ranks: Sequence[Rank]) -> ExitStatus:
    """Return which rank failed first and why. Print the end of its log, with the log's path."""
    failed = [rank for rank in ranks if rank.code]
    if not failed:
        return ExitStatus(0)
    first = min(failed, key=_when)
    reported, code, log = first.read_error_file(), first.code or 0, first.end_of_log()
    if reported and first.stopped:
        code = reported[1]
    if reported:
        error = f"rank {first.number}: {reported[2]}"
    elif code < 0:
        error = f"rank {first.number} was killed by {_signal_name(-code)}"
    elif code in EXIT_CODES:
        error = f"rank {first.number} was asked to stop by {_signal_name(code - 128)}"
    elif line := _error_in(log):
        error = f"rank {first.number}: {line}"
    else:
        error = f"rank {first.number} ended with exit code {code}"
    if first.log and code not in EXIT_CODES:
        print(f"{log}\n{error}; its log: {first.log.name}", file=sys.stderr)
    return ExitStatus(code if code > 0 else 128 - code, first.number, error)


def _when(rank: Rank) -> tuple[bool, float]:
    """Return the key that sorts the rank that failed first to the front.

    A rank that was killed comes first, since its peers may report a lost connection before the kill is seen. A rank
    killed by SIGABRT does not: torch aborts a peer that can't reach the others.
    """
    reported = rank.read_error_file()
    code = rank.code or 0
    killed = code < 0 and not rank.stopped and code not in {*EXIT_CODES, -signal.SIGABRT}
    return not killed, min(rank.ended, reported[0] if reported else math.inf)


def _error_in(log: str) -> str | None:
    """Return the first line of the last traceback's exception, else the last line that starts with `error: `."""
    lines = log.splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    return next((line for line in lines[starts[-1] + 1 :] if line and not line[0].isspace()), None)


def _signal_name(number: int) -> str:
    return {signum.value: signum.name for signum in signal.Signals}.get(number, f"signal {number}")
