"""A terminal for tests: what a process says to one of so many columns, byte by byte and line by line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.support import processes
from tests.support.processes import contained, patience, run

LIMIT = 120.0  # seconds
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9]+)*m")
LOUD = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@dataclass(frozen=True)
class Said:
    """Everything that was written, and how the process ended."""

    raw: str
    code: int

    @property
    def lines(self) -> list[str]:
        """What stood on a line at some time, without colours and cursor movements, each once in a row."""
        parts = [part.rstrip() for part in re.split(r"[\r\n]+", CONTROL.sub("", self.raw))]
        return [part for i, part in enumerate(parts) if part and (i == 0 or part != parts[i - 1])]


def environment(**variables: str) -> dict[str, str]:
    quiet = {name: value for name, value in os.environ.items() if name not in LOUD}
    return quiet | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


def on_terminal(*arguments: str, columns: int, cwd: Path, **variables: str) -> Said:
    """`python arguments` with a terminal of so many columns as all three of its streams."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = environment(**({"TERM": "xterm-256color"} | variables))
    command, written = [sys.executable, *arguments], b""
    deadline = time.monotonic() + patience(LIMIT)
    with contained(env) as marked:
        process = subprocess.Popen(
            command, cwd=cwd, env=marked, stdin=its, stdout=its, stderr=its, start_new_session=True
        )
        os.close(its)
        try:
            while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                written += os.read(ours, 65536)
        except OSError:
            pass  # how Linux says that the other side has closed
        finally:
            os.close(ours)
        try:
            code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            processes.kill_all(marked[processes.MARK])
            process.wait()
            raise
    return Said(written.decode(), code)


def in_pipe(*arguments: str, cwd: Path, **variables: str) -> Said:
    """The same with a pipe instead."""
    command = [sys.executable, *arguments]
    result = run(command, cwd=cwd, env=environment(**variables), stderr=subprocess.STDOUT, timeout=LIMIT)
    return Said(result.stdout, result.returncode)
