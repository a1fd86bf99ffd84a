"""Whatever a test starts is gone after its time limit: children of children, in sessions of their own, deaf to SIGTERM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.processes import MARK, MOST, carrying, contained, patience, session_mark
from tests.support.sweeping import until
from tests.support.terminal import on_terminal
from tests.support.warm import Warm

# hangs, as does a child that took a session of its own, and a child of that one, which ignores SIGTERM
HANGS = "trap '' TERM; sleep 600 & setsid sh -c 'sleep 600 & wait' & wait"


def hang() -> None:
    subprocess.run(["sh", "-c", HANGS])


@pytest.fixture
def killed(monkeypatch) -> list[int]:
    """How many processes each call of kill_all found."""
    found, real = [], processes.kill_all

    def counting(mark: str) -> None:
        found.append(len(carrying(mark)))
        real(mark)
        assert carrying(mark) == []

    monkeypatch.setattr(processes, "kill_all", counting)
    return found


def test_a_command_that_hangs_is_killed_with_all_that_it_started(killed, monkeypatch):
    before = len(carrying(session_mark()))
    monkeypatch.setattr(
        processes, "patience", lambda _: until(lambda: len(carrying(session_mark())) - before == 4) * 0.01
    )
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(["sh", "-c", HANGS], timeout=1)
    assert max(killed) == 4  # sh, sleep, sh, sleep
    assert len(carrying(session_mark())) == before


def test_so_is_one_on_a_terminal(killed, monkeypatch):
    monkeypatch.setattr("tests.support.terminal.LIMIT", 1.0)
    with pytest.raises(subprocess.TimeoutExpired):
        on_terminal("-c", f"import subprocess; subprocess.run(['sh', '-c', {HANGS!r}])", columns=80, cwd=Path.cwd())
    assert max(killed) >= 1


def test_so_is_a_warm_process(killed, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired), Warm(hang, cwd=tmp_path) as process:
        until(lambda: len(carrying(process.mark)) == 4)
        process.wait(0.01)
    assert 4 in killed
    assert carrying(process.mark) == []


def test_a_command_that_ends_leaves_no_child_behind():
    with contained(os.environ) as environment:
        inner = environment[MARK]
        done = processes.run([sys.executable, "-c", "import os; print(os.environ['" + MARK + "'])"], timeout=30)
    assert done.returncode == 0
    assert carrying(inner) == carrying(done.stdout.strip()) == []


def test_a_time_limit_grows_with_the_load(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, times in ((0.1, 1), (2.0, 1), (6.0, 3), (1000.0, MOST)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert patience(10) == 10 * times
