"""Watch the ranks of one run: wait for them, pass signals on, kill what is left, and name the rank that failed first."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dpo_lab.distributed.signals import REQUEUE, STOP_SIGNALS, TIME_IS_UP, StopRequest, StopSignal

ERROR_FILE = "DPO_LAB_ERROR_FILE"  # the variable that says where a rank tells its supervisor what went wrong
EXIT_CODES = {
    code for signum in (*STOP_SIGNALS, TIME_IS_UP) for code in (128 + signum, -signum)
}  # exit codes of a process that was asked to stop

# Seconds. Once one rank has failed or was asked to stop, none is there 10 seconds later.
PEER_EXIT_S = 4.0  # for the others to end by themselves, after one that was asked to stop
TERM_TO_KILL_S = 2.5  # from our SIGTERM to SIGKILL
DEBOUNCE_S = 0.5  # signals this close together are one request: `timeout` sends it to the process and to its group

TAIL = 16_384  # bytes of a log that are looked at
TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class ExitStatus:
    """How a run of several ranks ended.

    `code` is 0, or the exit code of the culprit, the rank that broke the run (128 + n where signal n killed it). `error` is
    one line for the user, which names the culprit. Both are None if all is well.
    """

    code: int
    culprit: int | None = None
    error: str | None = None


def report_error(error: str, code: int) -> None:
    """In a rank that is about to end with exit code `code` other than 0: tell its supervisor why, before any clean-up.

    The first rank to tell is the culprit, however long its clean-up takes. Of `error` the first line is kept.
    Where there is no supervisor nothing happens, nor on a full disk.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None or not error.strip() or os.path.exists(path):
        return
    with suppress(OSError):
        Path(path).write_text(f"{time.monotonic()} {code} {error.strip().splitlines()[0]}")


def report_stop(stopped: StopSignal) -> None:
    """The same, in a rank that was asked to stop: before its connections close, so that no peer tells of those first."""
    report_error(f"stopped by {stopped}", stopped.exit_code)


class RepeatableStopRequest(StopRequest):
    """A request to stop, and whether it came `again`: whoever repeats it wants no more waiting."""

    again = False
    _first = math.inf

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first > DEBOUNCE_S:
            self.again = True


@dataclass
class Rank:
    """One rank's process, which leads a session of its own."""

    number: int
    process: subprocess.Popen
    told: Path
    log: IO[bytes] | None  # None for rank 0, which writes where we write
    log_start: int  # bytes of the log that an earlier start wrote
    wake: int | None  # a descriptor that can be read once the process has ended
    code: int | None = None
    ended: float = math.inf  # when it was seen to have ended by itself
    stopped: bool = False  # by us: how it ended says nothing

    @classmethod
    def start(cls, number: int, command: Sequence[str], folder: Path, cwd: Path, variables: dict[str, str]) -> Rank:
        told = folder.absolute() / f".rank-{number}.error"
        told.unlink(missing_ok=True)
        log = (folder / f"rank-{number}.log").open("ab+") if number else None
        log_start = os.fstat(log.fileno()).st_size if log else 0
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=variables | {ERROR_FILE: str(told)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError:
            if log:
                log.close()
            raise
        wake = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
        return cls(number, process, told, log, log_start, wake)

    def is_running(self) -> bool:
        """Whether it runs still. What it leaves behind when it ends, workers of its data loaders say, is killed."""
        if self.code is None:
            self.code = self.process.poll()
            if self.code is not None:
                self.ended = math.inf if self.stopped else time.monotonic()
                self._kill_session()
        return self.code is None

    def stop(self, signum: int) -> None:
        """End it: a signal to the leader alone, which answers for its own processes, but SIGKILL to all of them."""
        self.stopped = True
        if signum == signal.SIGKILL:
            self._kill_session()
            self.process.wait()
            self.is_running()
        else:
            self.process.send_signal(signum)

    def close(self) -> None:
        if self.is_running():
            self.stop(signal.SIGKILL)
        self.told.unlink(missing_ok=True)
        if self.log:
            self.log.close()
        if self.wake is not None:
            os.close(self.wake)

    def _kill_session(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def what_it_told(self) -> tuple[float, int, str] | None:
        """When it failed, the exit code it was to end with and the error; None if it told nothing."""
        try:
            at, code, error = self.told.read_text().split(" ", 2)
            return float(at), int(code), error
        except (OSError, ValueError):
            return None

    def end_of_log(self) -> str:
        """The last words in its log: its tracebacks, or else some lines."""
        if self.log is None:
            return ""
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.log_start, size - TAIL)
        text = os.pread(self.log.fileno(), size - start, start).decode(errors="replace")
        lines = re.sub(r"^\[rank\d+\]: ?", "", text, flags=re.MULTILINE).splitlines()  # torch's prefix
        first = next((i for i, line in enumerate(lines) if line.endswith(TRACEBACK)), len(lines) - 20)
        return "\n".join(lines[max(0, first) :])


def supervise(ranks: Sequence[Rank], asked: RepeatableStopRequest, grace: float) -> None:
    """Wait until all ranks have ended, and see to it that they do once one has failed or `asked` says so."""
    forwarded = broken = False
    ask_at = kill_at = math.inf
    while running := [rank for rank in ranks if rank.is_running()]:
        now = time.monotonic()
        codes = [rank.code for rank in ranks if rank.code]
        if asked.signum is not None and not forwarded:
            forwarded, ask_at, kill_at = True, math.inf, min(kill_at, now + grace)
            for rank in running:
                rank.process.send_signal(signal.SIGTERM if asked.signum == REQUEUE else asked.signum)
        if not broken and any(code not in EXIT_CODES for code in codes):
            broken, ask_at, kill_at = True, now, min(kill_at, now + TERM_TO_KILL_S)
        elif codes and kill_at == math.inf:  # they agree on when to stop: the others are about to end too
            ask_at, kill_at = now + PEER_EXIT_S, now + PEER_EXIT_S + TERM_TO_KILL_S
        if now >= ask_at:
            ask_at = math.inf
            for rank in running:
                rank.stop(signal.SIGTERM)
        if asked.again or now >= kill_at:
            for rank in running:
                rank.stop(signal.SIGKILL)
                if forwarded:
                    print(
                        f"rank {rank.number} had not ended when it was asked to stop, and was killed", file=sys.stderr
                    )
        _wait(running)


def _wait(running: Sequence[Rank]) -> None:
    """Until one of them ends, for a short while."""
    wakes = [rank.wake for rank in running if rank.wake is not None]
    if wakes:
        select.select(wakes, [], [], 0.1)
    else:
        time.sleep(0.05)


def root_cause(ranks: Sequence[Rank]) -> ExitStatus:
    """Who broke the run, and why. What its log says of a rank that failed is shown, with the log's path."""
    failed = [rank for rank in ranks if rank.code]
    if not failed:
        return ExitStatus(0)
    culprit = min(failed, key=_when)
    told, code = culprit.what_it_told(), culprit.code or 0
    if told and culprit.stopped:
        code = told[1]
    if told:
        error = f"rank {culprit.number}: {told[2]}"
    elif code < 0:
        error = f"rank {culprit.number} was killed by {_signal_name(-code)}"
    elif code in EXIT_CODES:
        error = f"rank {culprit.number} was asked to stop by {_signal_name(code - 128)}"
    elif line := _error_in(culprit.end_of_log()):
        error = f"rank {culprit.number}: {line}"
    else:
        error = f"rank {culprit.number} ended with exit code {code}"
    if culprit.log and code not in EXIT_CODES:
        print(f"{culprit.end_of_log()}\n{error}; all that it wrote: {culprit.log.name}", file=sys.stderr)
    return ExitStatus(code if code > 0 else 128 - code, culprit.number, error)


def _when(rank: Rank) -> tuple[bool, float]:
    """What orders ranks by their part in the failure, the culprit first.

    A peer of one that was killed may tell of a lost connection before we see the kill. Only SIGABRT can be a peer's end:
    torch aborts where the others can't be reached.
    """
    told = rank.what_it_told()
    code = rank.code or 0
    killed = code < 0 and not rank.stopped and code not in {*EXIT_CODES, -signal.SIGABRT}
    return not killed, min(rank.ended, told[0] if told else math.inf)


def _error_in(log: str) -> str | None:
    """The first line of the exception that the last traceback ends with."""
    lines = log.splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    return next((line for line in lines[starts[-1] + 1 :] if line and not line[0].isspace()), None)


def _signal_name(number: int) -> str:
    return {signum.value: signum.name for signum in signal.Signals}.get(number, f"signal {number}")
