"""Processes that start warm: forks of one that has imported what a run imports, and nothing else of this test process.

A fresh interpreter spends four seconds of CPU on imports. Where a test is about how a process starts, or is started by ours,
it takes one all the same (`tests.conftest.python_m`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dpo_lab.distributed.launcher import set_parent_death_signal
from tests.conftest import OFFLINE, REPOSITORY
from tests.support.processes import MARK, contained, patience

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.loaded"])


def start_fork(function: Callable[..., object], *arguments: Any, daemon: bool = False) -> ForkServerProcess:
    """Start function(*arguments) in a fork of the warm process, which is started if it isn't running: with one thread, since
    all forks round as its torch does.
    """
    with patch.dict(os.environ, OFFLINE | {"PYTHONPATH": str(REPOSITORY)}):  # this test may stand elsewhere by now
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


class Warm:
    """function(*arguments) in a warm process of its own, its folder `cwd`. A context: nothing is left of it afterwards."""

    def __init__(self, function: Callable[..., object], *arguments: Any, cwd: Path, **variables: str) -> None:
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self.files]
        self.stack = ExitStack()
        environment = self.stack.enter_context(contained(os.environ | OFFLINE | variables))
        self.mark = environment[MARK]
        self.process = start_fork(_live, function, arguments, str(cwd), environment, names)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.stack.close()
        for file in self.files:
            file.close()

    def wait(self, timeout: float) -> tuple[int, str, str]:
        """(exit code, as subprocess has it; stdout; stderr) once it is over."""
        self.process.join(patience(timeout))
        output, errors = (Path(file.name).read_text() for file in self.files)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout, output, errors)
        return self.process.exitcode, output, errors


def _live(function, arguments, cwd: str, environment: dict[str, str], files: Sequence[str]) -> None:
    assert "dpo_lab.pipelines.train_dpo" in sys.modules, "tests.support.loaded was not loaded before the fork"
    set_parent_death_signal(signal.SIGKILL)  # a fork server ends with the tests, and so do its forks
    for stream, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    function(*arguments)


def run_module(
    module: str, *arguments: str, cwd: Path, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `tests.conftest.python_m`: `python -m module ...` as a user types it."""
    command = [module, *arguments]
    with Warm(main, *command, cwd=cwd, **variables) as process:
        return subprocess.CompletedProcess(command, *process.wait(timeout))


def main(module: str, *arguments: str) -> None:
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
