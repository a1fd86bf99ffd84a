"""Sweeps of the stand-in module as real processes: start them, see what started, wait for what is to happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY, python_m
from tests.support.processes import contained, patience

ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "160", "RAY_AUTH_MODE": "disabled"}


def sweep(
    folder: Path, *arguments: str, module: str = "tests.support.standin", **variables: str
) -> subprocess.CompletedProcess:
    return run(module, folder, "--multirun", *arguments, **variables)


def run(module: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return python_m(module, *arguments, cwd=folder, **ENVIRONMENT, **variables)


@contextmanager
def started(
    folder: Path, *arguments: str, module: str = "tests.support.standin", **variables: str
) -> Iterator[subprocess.Popen]:
    """The same, not waited for; it leads a session of its own, writes to terminal.log, and is gone in the end."""
    command = [sys.executable, "-m", module, "--multirun", *arguments]
    with contained(os.environ | ENVIRONMENT | variables) as environment:
        with (folder / "terminal.log").open("w") as terminal:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, start_new_session=True, stdout=terminal, stderr=subprocess.STDOUT
            )
        yield process
    process.wait()


def behaves(folder: Path, **parts: str) -> None:
    """What the runs do whose folder's path holds such a part: see tests/support/standin.py. `_` stands for `=`."""
    (folder / "behaviour.json").write_text(json.dumps({part.replace("_", "="): what for part, what in parts.items()}))


def starts(folder: Path) -> list[dict[str, Any]]:
    """The jobs' processes that started so far, in order."""
    log = folder / "starts.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def told(folder: Path, name: str = "dpo") -> dict[str, Any]:
    return json.loads((folder / "outputs" / name / "sweep.json").read_text())


def statuses(folder: Path) -> list[str]:
    return [job["status"] for job in told(folder)["jobs"]]


def said(folder: Path, job: str) -> str:
    """What a job (`beta=0.1/seed=0`) wrote to its terminal."""
    return (folder / "outputs" / "dpo" / job / "output.log").read_text()


def record(folder: Path, job: str) -> dict[str, Any]:
    return json.loads((folder / "outputs" / "dpo" / job / "run.json").read_text())


def until(what: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for `what` to be true; gives what it gave."""
    deadline = time.monotonic() + patience(seconds)
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ValueError):
            if found := what():
                return found
        time.sleep(0.02)
    raise AssertionError("it did not come about in time")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def members(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, leader = path.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def openers(path: Path) -> set[int]:
    """The processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(link) == str(path):
                found.add(int(link.parts[2]))
    return found


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file under `folder`, with its time and what it holds."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
