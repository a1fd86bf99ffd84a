"""The soak: a few kills of it, that a difference is found, and that what a start leaves alive is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.soak import processes
from benchmarks.soak.place import Place
from tests.support.warm import Warm, run_module

pytestmark = pytest.mark.slow


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("benchmarks.soak", "--folder", "here", *arguments, cwd=folder)


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """A soak of a few kills, and the folder with its twins."""
    folder = tmp_path_factory.mktemp("soak")
    return folder, soak(folder, "--kills", "5", "--only", "fit", "--json", "soak.json")


def test_a_few_kills_make_no_difference(soaked):
    folder, result = soaked
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((folder / "soak.json").read_text())["kinds"]["fit"]
    assert found["kills"] == found["SIGKILL"] + found["SIGTERM"] >= 5
    assert found["differences"] == []
    assert found["starts"] >= found["kills"] + found["early"]
    assert found["compared"] >= 2
    assert f"{found['kills']} kills, {found['resumes']} resumes, 0 differences in" in result.stdout
    assert sorted(os.listdir(folder / "here")) == ["cache", "twins"]  # what was compared is gone


@pytest.mark.extended  # in make test: kills of a fit
def test_a_killed_training_is_compared_whole(tmp_path):
    result = soak(tmp_path, "--kills", "1", "--only", "train", "--json", "soak.json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "soak.json").read_text())["kinds"]["train"]
    assert found["kills"] >= 1
    assert found["compared"] >= 1


def test_a_byte_that_differs_from_the_twins_is_found(soaked):
    folder, _ = soaked
    journal = folder / "here" / "twins" / "fit" / "run" / "metrics.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    result = soak(folder, "--kills", "1", "--only", "fit")
    assert result.returncode == 1
    (kept, *_) = sorted((folder / "here").glob("fit-*"))
    assert f"difference {kept}/run/metrics.jsonl: other bytes" in result.stdout
    assert " 0 differences" not in result.stdout


def leave_one_behind(cwd: str) -> None:
    """In a process of its own: a start whose child outlives it; and what is said of one that ends as it may not."""

    def leave() -> None:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(60)
        raise SystemExit(3)

    told = []
    processes.adopt_orphans()
    place = Place(Path(cwd), 0, 0, lambda: False, told.append)
    trial = place.trial("fit")
    with patch.object(processes, "GONE", 0.2):
        trial.note(processes.start(["benchmarks.soak.small", "run"], trial.cwd, before=leave), {0})
    assert list(processes.children(os.getpid())) == []
    print(json.dumps([each["difference"] for each in told if "difference" in each]))


def test_a_process_that_is_left_alive_and_an_exit_code_that_may_not_be_are_differences(tmp_path):
    with Warm(leave_one_behind, str(tmp_path), cwd=tmp_path) as process:
        code, said, errors = process.wait(60)
    assert code == 0, errors
    ended, left = json.loads(said)
    assert "a start ended with 3" in ended
    assert "was left alive 0 s after its start had ended" in left
