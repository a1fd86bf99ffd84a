"""Two ranks under a supervisor, all real processes: what each rank does is scripted, and each tells the test where it is."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.processes import contained, patience
from tests.support.ranks import REPOSITORY

DEADLINE = 30.0  # seconds in which what must happen has happened, on a busy machine

SUPERVISOR = """
import json, sys
from pathlib import Path
from dpo_lab.distributed.launcher import run_ranks
from dpo_lab.distributed.signals import StopSignal, raise_on_signals
raise_on_signals()
folder, grace, *command = sys.argv[1:]
try:
    ended = run_ranks(command, 2, folder=Path(folder), cwd=Path(folder), grace=float(grace))
except StopSignal as stopped:
    sys.exit(stopped.exit_code)
print(json.dumps(vars(ended)))
sys.exit(ended.code)
"""

RANK = """
import json, os, signal, socket, subprocess, sys, time
from dpo_lab.distributed.launcher import PARENT, rank, set_parent_death_signal
from dpo_lab.distributed.signals import StopRequest, StopSignal, raise_on_signals
from dpo_lab.distributed.supervisor import report_stop, report_error

went = []
signal.signal(signal.SIGUSR1, lambda *_: went.append(True))  # no mask: one of numpy's threads would take it, and die of it
def go():
    while not went:
        time.sleep(0.005)
def stay():  # not signal.pause: a signal that comes just before it is waited for in vain
    while True:
        time.sleep(0.005)

set_parent_death_signal(signal.SIGKILL, int(os.environ[PARENT]))
raise_on_signals()
post, me = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), rank()
say = lambda what, **more: post.sendto(json.dumps({"rank": me, "what": what, **more}).encode(), chr(0) + sys.argv[1])

class Agreed(StopRequest):
    def __enter__(self):
        super().__enter__()
        self.agreed = "asked"  # a file that all ranks look at: one that was asked to stop stops them all
        return self
    def wait(self):
        while not os.path.exists(self.agreed):
            if self.signum is not None:
                open(self.agreed, "w").close()
            time.sleep(0.005)
        self.raise_or_requeue(signal.SIGTERM)

def child():  # as a worker of a data loader: in the rank's group, and deaf to SIGTERM
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process.pid

def ready(**more):
    say("ready", pid=os.getpid(), port=os.environ["MASTER_PORT"], child=child(), **more)

def agrees():
    with Agreed() as request:
        ready()
        request.wait()

def saves():  # its save takes as long as the test likes
    with StopRequest() as request:
        ready()
        while request.signum is None:
            time.sleep(0.005)
        say("asked", signum=request.signum)
        go()
        say("saved")
        request.raise_or_requeue(request.signum)

def is_stuck():
    signal.signal(signal.SIGTERM, lambda *_: say("asked"))
    signal.signal(signal.SIGINT, lambda *_: say("asked"))
    ready()
    stay()

def is_stopped():
    ready()
    go()
    raise StopSignal(signal.SIGTERM)

def waits():
    ready()
    stay()

def raises():
    ready()
    go()
    try:
        raise OSError("the cause")
    except OSError as error:
        raise ValueError("boom\\nsecond line") from error

def leaves():
    ready()
    go()
    os._exit(3)

def fails_to_save():
    with StopRequest() as request:
        ready()
        while request.signum is None:
            time.sleep(0.005)
    raise OSError("no space left")

def tells():
    ready()
    go()
    report_error("ValueError: boom\\nsecond line", 1)
    say("told")
    stay()  # a long clean-up

def tells_and_ends():
    ready()
    go()
    report_error("RuntimeError: connection closed by peer", 1)
    sys.exit(1)

def takes_long_to_stop():
    raise_on_signals(report_stop)
    try:
        ready()
        stay()
    finally:
        say("stopping")
        go()

def ends():
    ready()
    go()

try:
    globals()[sys.argv[2 + me]]()
except StopSignal as stopped:
    sys.exit(stopped.exit_code)
"""


class Post:
    """Where processes of a test report to."""

    def __init__(self, name: str) -> None:
        self.name = f"dpo_lab-test-{os.getpid()}-{name}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + self.name)
        self.socket.settimeout(patience(DEADLINE))

    def next(self, what: str | None = None) -> dict:
        report = json.loads(self.socket.recv(65536))
        assert what is None or report["what"] == what, report
        return report


class Group:
    """A supervisor and its two ranks, each with a child of its own. A context: nothing is left of it afterwards."""

    def __init__(self, folder: Path, *scripts: str, grace: float = 60.0) -> None:
        self.folder, self.post = folder, Post(folder.name)
        folder.mkdir(exist_ok=True)
        rank = [sys.executable, "-c", RANK, self.post.name, *scripts]
        self.stack = ExitStack()
        self.supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(folder), str(grace), *rank],
            env=self.stack.enter_context(contained(os.environ | {"PYTHONPATH": str(REPOSITORY)})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.watched: dict[int, int] = {}

    def __enter__(self) -> Group:
        try:
            reports = sorted((self.post.next("ready") for _ in range(2)), key=lambda report: report["rank"])
        except TimeoutError:
            self.__exit__()
            raise AssertionError(self.errors) from None
        self.pids = [report["pid"] for report in reports]
        self.ports = {report["port"] for report in reports}
        processes = [*self.pids, *(report["child"] for report in reports)]
        self.watched = {os.pidfd_open(pid): pid for pid in processes}
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        for watched in self.watched:
            os.close(watched)
        self.errors = self.supervisor.communicate()[1]  # once nobody is left to write
        self.post.socket.close()

    def go(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGUSR1)

    def gone(self, seconds: float = 10.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the supervisor, once it, its ranks and their children are gone, within `seconds`."""
        seconds = patience(seconds)
        end = time.monotonic() + seconds
        output, errors = self.supervisor.communicate(timeout=seconds)
        for watched, pid in self.watched.items():
            assert has_ended(watched, max(0.0, end - time.monotonic())), f"process {pid} is left"
        return self.supervisor.returncode, output, errors


def has_ended(pidfd: int, seconds: float = 0.0) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])
