"""Child processes of tests: none outlives its time limit, and a time limit grows with the load of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

MARK = "DPO_LAB_TEST_PROCESS"  # a variable that all processes of a test inherit, in whatever session and under whatever parent
MOST = 10.0  # times that a time limit may grow
_numbers = count()


def patience(seconds: float) -> float:
    """Return a time limit for a machine under load: `seconds` times the processes that wait for each CPU, up to MOST."""
    return seconds * min(MOST, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def carrying(mark: str) -> list[int]:
    """Return the processes that are alive and were started with `mark`, or with a longer mark that begins so."""
    entry, found = f"\0{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if entry in b"\0" + path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def kill_all(mark: str) -> None:
    """Kill the processes that carry `mark`, and those that they start meanwhile."""
    while found := carrying(mark):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def contained(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Give an environment for child processes; at the end none that was started with it is left, nor any of theirs."""
    mark = f"{session_mark()}{next(_numbers)}-"
    try:
        yield {**environment, MARK: mark}
    finally:
        kill_all(mark)


def run(
    command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None, **settings: Any
) -> subprocess.CompletedProcess:
    """Run a command as subprocess.run does with what it prints as text; all that it started is gone when this returns.

    Raises TimeoutExpired after `timeout` seconds, on a machine without load.
    """
    with contained(os.environ if env is None else env) as environment:
        settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | settings
        process = subprocess.Popen(command, env=environment, start_new_session=True, **settings)
        try:
            output, errors = process.communicate(timeout=patience(timeout))
        except BaseException:
            kill_all(environment[MARK])  # before its pipes are read to their end
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def session_mark() -> str:
    """Return what the mark of every process of this test session begins with."""
    return f"{os.getpid()}-"
