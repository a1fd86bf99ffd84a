"""GPUs are locked by one process at a time, whatever becomes of it; the CPUs are shared out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpo_lab.distributed import resource_locks
from tests.support.supervised import Post, has_ended

# Leases 2 GPUs when it is given a line and lets go at the next; meanwhile it has a child, which lives on if it is killed.
LEASE = """
import json, logging, socket, subprocess, sys
from dpo_lab.distributed.resource_locks import acquire_gpus
name, who, children = sys.argv[1:]
post = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
say = lambda what, **more: post.sendto(json.dumps({"who": who, "what": what, **more}).encode(), chr(0) + name)
class Told(logging.Handler):
    def emit(self, record):
        say("waits", line=record.getMessage())
logging.basicConfig(level="INFO", handlers=[Told()])
for line in sys.stdin:
    with acquire_gpus(2, poll=0.01) as gpus:
        child = subprocess.Popen(["cat"], stdin=int(children))
        say("took", gpus=gpus, child=child.pid)
        sys.stdin.readline()
        child.kill()
        child.wait()
        say("leaves", gpus=gpus)
"""


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch) -> Path:
    """A temp folder of the test's own, so that no lease of another program counts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    return tmp_path


class Leasers:
    """Processes that run LEASE, for the 4 GPUs of the fixture. No child outlives the context."""

    def __init__(self, names: str) -> None:
        self.post, self.held = Post("leases"), {}
        children, self.children = os.pipe()
        self.processes = {
            name: subprocess.Popen(
                [sys.executable, "-c", LEASE, self.post.name, name, str(children)],
                stdin=subprocess.PIPE,
                pass_fds=[children],
            )
            for name in names
        }
        os.close(children)

    def __enter__(self) -> Leasers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()
        os.close(self.children)  # the end of what the children read
        self.post.socket.close()

    def line(self, name: str) -> None:
        pipe = self.processes[name].stdin
        assert pipe
        pipe.write(b"\n")
        pipe.flush()

    def next(self) -> dict:
        """The next report; no GPU is held twice."""
        report = self.post.next()
        if report["what"] == "took":
            assert len(report["gpus"]) == 2
            assert not set(report["gpus"]) & {gpu for gpus in self.held.values() for gpu in gpus}
            self.held[report["who"]] = report["gpus"]
        elif report["what"] == "leaves":
            del self.held[report["who"]]
        return report


def test_three_processes_share_four_gpus_two_at_a_time():
    with Leasers("abc") as leasers:
        for name in "abc":
            leasers.line(name)
        took, left = [], None
        while len(took) < 12:
            report = leasers.next()
            if report["what"] == "leaves":
                left = report["who"]
            elif report["what"] == "took":
                took.append(report["who"])
                if (
                    len(leasers.held) == 2
                ):  # the one that holds them longest gives way, the one that gave way asks again
                    leasers.line(next(iter(leasers.held)))
                    if left:
                        leasers.line(left)
        assert set(took) == {"a", "b", "c"}


def test_a_killed_process_frees_its_gpus_though_its_child_lives_on():
    with Leasers("abc") as leasers:
        for name in "ab":
            leasers.line(name)
            child = os.pidfd_open(leasers.next()["child"])
            if name == "a":
                os.close(child)
        leasers.line("c")
        assert leasers.next()["line"] == "waiting for 2 of the GPUs 0,1,2,3, which other runs use"
        freed = leasers.held.pop("b")
        leasers.processes["b"].kill()
        report = leasers.next()
        assert (report["who"], report["gpus"]) == ("c", freed)
        assert not has_ended(child)
        os.close(child)


def test_more_gpus_than_there_are_is_an_error_at_once():
    with pytest.raises(ValueError, match="^trainer.devices=5: only 4 GPUs are visible; type trainer.devices=4$"):
        resource_locks.acquire_gpus(5).__enter__()


def test_no_gpu_is_leased_to_who_needs_none(monkeypatch):
    with resource_locks.acquire_gpus(0) as gpus:
        assert gpus is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="^trainer.devices=1: no GPU is visible; type trainer=cpu"):
        resource_locks.acquire_gpus(1).__enter__()


@pytest.mark.parametrize(
    ("variable", "seen"),
    [("0,1", ["0", "1"]), ("", []), ("-1", []), ("2,-1,3", ["2"]), ("GPU-8f3a, MIG-1/0", ["GPU-8f3a", "MIG-1/0"])],
)
def test_visible_gpus_are_those_that_cuda_would_see(variable, seen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert resource_locks.visible_gpus() == seen
    if seen:
        with resource_locks.acquire_gpus(len(seen)) as gpus:
            assert gpus == seen


def test_nvidia_smi_is_asked_where_no_variable_tells(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resource_locks.visible_gpus() is None
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g (UUID: MIG-1)'\necho 'GPU 1: A (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    assert resource_locks.visible_gpus() == ["0", "1"]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert resource_locks.visible_gpus() is None


def test_the_locks_lie_where_no_one_else_can_write(temp, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    place = temp / f"dpo_lab-{os.getuid()}"
    with resource_locks.acquire_gpus(1):
        assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o770)
    with pytest.raises(
        PermissionError, match="is a folder that other users own or can access; remove it, or set TMPDIR"
    ):
        resource_locks.acquire_gpus(1).__enter__()
    place.chmod(0o700)
    place.rename(temp / "elsewhere")
    place.symlink_to(temp / "elsewhere")
    with pytest.raises(PermissionError, match="is a folder that other users own or can access"):
        resource_locks.acquire_gpus(1).__enter__()


def test_cpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert [resource_locks.threads_per_job(jobs) for jobs in (1, 3)] == [1, 1]
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert [resource_locks.threads_per_job(jobs) for jobs in (1, 2, 3, 9)] == [8, 4, 2, 1]
