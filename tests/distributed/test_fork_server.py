"""The fork server: its processes are those of `python -m`, start with its imports done, and end as others do."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lab.distributed.fork_server import ForkServer, fast_imports
from tests.support.sweeping import is_alive, until

SLOW = "import os, time\nprint('imported', flush=True)\nTIME = os.getpid()\n"
JOB = """
import os, sys, time
import imported_before
print(sys.argv[1:], os.getcwd(), os.environ["OF_ALL"], __name__, imported_before.TIME == os.getppid())
if sys.argv[1] == "raise":
    raise ValueError("as it is")
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def server(tmp_path):
    """A server of a process that ignores SIGTERM, which its processes would inherit."""
    (tmp_path / "imported_before.py").write_text(SLOW)
    (tmp_path / "a_job.py").write_text(JOB)
    environment = {**os.environ, "OF_ALL": "all", "PYTHONPATH": os.pathsep.join(sys.path)}
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    found = ForkServer("imported_before", environment, str(tmp_path))
    signal.signal(signal.SIGTERM, before)
    yield found
    found.close()


def run(server: ForkServer, output: Path, argument: str) -> int:
    with output.open("ab") as file:
        return server.start(["a_job", argument], file).wait(30)


def test_runs_modules_with_its_imports_done(server, tmp_path):
    output = tmp_path / "output"
    assert [run(server, output, code) for code in ("0", "3")] == [0, 3]
    assert output.read_text().splitlines() == [f"['{code}'] {tmp_path} all __main__ True" for code in "03"]
    assert run(server, output, "raise") == 1
    *_, traceback, error = output.read_text().partition("Traceback")
    assert traceback
    assert error.endswith("ValueError: as it is\n")


def test_signals_and_a_lock_reach_the_process(server, tmp_path):
    with (tmp_path / "output").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        fork = server.start(["a_job", "wait"], file)
    assert fork.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.01)
    assert os.getsid(fork.pid) == fork.pid
    with (tmp_path / "output").open("ab") as file:
        with pytest.raises(BlockingIOError):  # it holds the lock of the file that it writes to
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fork.send_signal(signal.SIGTERM)
        assert fork.wait(30) == fork.poll() == -signal.SIGTERM
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fork.kill()  # of no effect
    assert run(server, tmp_path / "output", "0") == 0


def test_a_server_that_has_ended_says_so(server, tmp_path):
    with (tmp_path / "output").open("ab") as file:
        fork = server.start(["a_job", "wait"], file)
        server.process.kill()
        assert fork.wait(30) == -signal.SIGTERM
        os.kill(fork.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                server.start(["a_job", "0"], file)
    failing = ForkServer("there_is_no_such_module", dict(os.environ), str(tmp_path))
    with (tmp_path / "output").open("ab") as file, pytest.raises(ConnectionError):
        failing.start(["a_job", "0"], file)
    failing.close()


def test_a_server_is_killed_with_its_parent_also_while_it_imports(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    parent = (
        "import os; from dpo_lab.distributed.fork_server import ForkServer\n"
        f"print(ForkServer('slow', os.environ, {str(tmp_path)!r}).process.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.run([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True)
    assert started.returncode == -signal.SIGKILL
    until(lambda: not is_alive(int(started.stdout)), seconds=30)


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


def test_what_is_loaded_is_never_looked_at_by_the_collector_again(tmp_path, monkeypatch, unfrozen):
    (tmp_path / "loaded_by_a_command.py").write_text(
        "import gc\nCOLLECTS = gc.isenabled()\nKEPT = [[number] for number in range(1000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fast_imports():
        import loaded_by_a_command  # type: ignore[import-not-found]
    assert not loaded_by_a_command.COLLECTS
    assert gc.isenabled()
    young = [object_ for generation in range(3) for object_ in gc.get_objects(generation)]
    assert not {id(kept) for kept in loaded_by_a_command.KEPT} & {id(object_) for object_ in young}
    assert gc.is_tracked(loaded_by_a_command.KEPT[0])
    del sys.modules["loaded_by_a_command"]


def test_the_collector_goes_on_where_an_import_fails(unfrozen):
    with pytest.raises(ModuleNotFoundError), fast_imports():
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
