"""The processes of a soak: forks of this one, which has loaded what runs import, or fresh ones; how they end; all gone."""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra

from dpo_lab.distributed.fork_server import Fork
from tests.conftest import OFFLINE, REPOSITORY

ENVIRONMENT = OFFLINE | {"PYTHONPATH": str(REPOSITORY)}
GONE = 10.0  # seconds after its end in which all that a start began is gone, as promised
STUCK = 240.0  # seconds without an end, on a machine that is busy with other things too
OPEN_FILES = 1024
FRESH = subprocess.Popen


class Forked(Fork):
    """`python -m module ...` in a fork of this process.

    A fresh interpreter spends four seconds of CPU on imports. before: called in the fork, ahead of the module.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | Path,
        env: Mapping[str, str],
        stdout: Any = None,
        stderr: Any = None,
        stdin: Any = None,
        start_new_session: bool = False,
        pass_fds: Sequence[int] = (),
        before: Callable[[], object] | None = None,
    ) -> None:
        streams = {1: stdout, 2: stdout if stderr == subprocess.STDOUT else stderr}
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid == 0:
            handles = {number: file.fileno() for number, file in streams.items() if file is not None}
            _become(command[2:], str(cwd), env, handles, start_new_session, pass_fds, before)
        super().__init__(pid, os.pidfd_open(pid), self._reap)

    def _reap(self) -> int:
        os.close(self._ended)  # type: ignore[arg-type]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork_what_it_starts() -> None:
    """From now on in this process: ranks and jobs are forks of it, too."""

    def start(command: Sequence[str], **settings: Any) -> Any:
        return (Forked if list(command[:2]) == [sys.executable, "-m"] else FRESH)(command, **settings)

    subprocess.Popen = start  # type: ignore[misc, assignment]


def _become(
    command: Sequence[str],
    cwd: str,
    environment: Mapping[str, str],
    handles: Mapping[int, int],
    new_session: bool,
    kept: Sequence[int],
    before: Callable[[], object] | None,
) -> NoReturn:
    """In a fork: be `python -m` and the rest of the command from here on."""
    code: int | str | None = 1
    try:
        if new_session:
            os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, handle in handles.items():
            os.dup2(handle, stream)
        for number in set(range(3, OPEN_FILES)) - set(kept):
            with suppress(OSError):
                os.close(number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # another thread may have held the old one's lock
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        environment = dict(environment)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        GlobalHydra.instance().clear()
        sys.path.insert(0, cwd)  # as `python -m` has it
        sys.argv = list(command)
        if before is not None:
            before()
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with suppress(BaseException):
            if isinstance(code, str):
                print(code, file=sys.stderr)
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


@dataclass(frozen=True)
class Ended:
    """How a start ended: its exit code (as subprocess has it; None: it did not, and was killed), what it said on the
    terminal and as errors, and what of it was still there too long after.
    """

    code: int | None
    said: str
    errors: str
    left: Sequence[str] = ()


def start(
    command: Sequence[str],
    cwd: Path,
    *,
    strike: Callable[[int], object] | None = None,
    after: float = 0.0,
    fresh: bool = False,
    before: Callable[[], object] | None = None,
    beside: str = "",
) -> Ended:
    """Live one start of `python -m *command` through in `cwd`: after `after` seconds strike(pid), if it runs still.

    beside: a name for what this one says, while another is at work in the folder, whose processes are not waited for.
    """
    line, files = [sys.executable, "-m", *command], (cwd / f"said{beside}.txt", cwd / f"errors{beside}.txt")
    with files[0].open("w") as said, files[1].open("w") as errors:
        settings: dict[str, Any] = dict(cwd=cwd, env=os.environ | ENVIRONMENT, stdout=said, stderr=errors)
        process = FRESH(line, **settings) if fresh else Forked(line, before=before, **settings)
    code = _wait(process, after) if strike is not None else None
    if strike is not None and code is None:
        with suppress(ProcessLookupError):
            strike(process.pid)  # it is not reaped before we wait for it: the number is its own
    code = _wait(process, STUCK)
    if code is None:
        process.kill()
        process.wait()
    left = () if beside else gone(GONE)
    words = [file.read_text(errors="replace") for file in files]
    return Ended(code, words[0], words[1], left)


def _wait(process: Any, seconds: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def adopt_orphans() -> None:
    """Let what our processes leave behind become ours, so that it is found (Linux)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def gone(seconds: float) -> list[str]:
    """Wait for all processes that came from this one to be gone; those that are not by then are named, and killed."""
    deadline, left = time.monotonic() + seconds, []
    while processes := list(children(os.getpid())):
        if time.monotonic() > deadline:
            left = [f"{_command(pid)} was left alive {seconds:.0f} s after its start had ended" for pid in processes]
            break
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.02)
    for pid in list(children(os.getpid())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while left and os.waitpid(-1, 0):
            pass
    return left


def children(pid: int) -> Iterator[int]:
    """The processes that came from one, each one's in the order of their start, but for those that have ended."""
    born: dict[int, list[tuple[int, int]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *rest = path.read_text().rpartition(")")[2].split()
            if state != "Z":
                born.setdefault(int(parent), []).append((int(rest[17]), int(path.parent.name)))
    found = [pid]
    for parent in found:
        found += [child for _, child in sorted(born.get(parent, ()))]
    yield from found[1:]


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text()[:60]
    return str(pid)
