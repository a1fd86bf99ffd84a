"""What makes a process a rank, how many a machine runs, and what ranks are given."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from dpo_lab.distributed.launcher import DDP_VARIABLES, ExitStatus, is_rank, num_local_ranks, rank, run_ranks
from dpo_lab.distributed.supervisor import report_error
from tests.support.ranks import REPOSITORY
from tests.support.supervised import Group

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "sweep"}


@pytest.fixture(autouse=True)
def plain(monkeypatch) -> None:
    """A process that nobody has made a rank."""
    for name in (*DDP_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "known", "number"),
    [
        ({}, False, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, True, 3),
        ({"LOCAL_RANK": "1"}, True, 1),
        ({"LOCAL_RANK": "1", "NODE_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, True, 9),
        (SLURM, True, 2),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, 0),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, False, 0),
    ],
)
def test_a_rank_is_known_by_what_started_it(variables, known, number, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_rank(), rank()) == (known, number)


@pytest.mark.parametrize(
    ("accelerator", "devices", "count"),
    [
        ("cpu", 2, 2),
        ("cpu", "2", 2),
        ("cpu", "auto", 1),
        ("cpu", -1, 1),
        ("gpu", 4, 4),
        ("gpu", "auto", 3),
        ("cuda", -1, 3),
        ("gpu", "-1", 3),
        ("gpu", [0, 2], 2),
        ("gpu", "0,2", 2),
        ("gpu", "1,", 1),
        ("auto", "auto", 3),
        ("mps", "auto", 1),
    ],
)
def test_ranks_of_a_machine_follow_from_its_devices(accelerator, devices, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert num_local_ranks(accelerator, devices, 1) == count


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "trainer.devices=0: must be 1 or more, or -1 for all"),
        ("two", "trainer.devices=two: not a number of devices; type e.g. trainer.devices=2"),
        ([0, 0], "trainer.devices=[0, 0]: must name devices, each once"),
        ("auto", "trainer.devices=auto: neither CUDA_VISIBLE_DEVICES nor nvidia-smi says how many GPUs there are"),
    ],
)
def test_devices_that_can_not_be_counted_are_an_error(devices, message, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        num_local_ranks("gpu", devices, 1)
    assert num_local_ranks("auto", "auto", 1) == 1
    with pytest.raises(ValueError, match="trainer.num_nodes=0"):
        num_local_ranks("cpu", 1, 0)


def test_a_machine_without_gpus_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="trainer.devices=-1: no GPU is visible"):
        num_local_ranks("gpu", -1, 1)


# Prints whether it has a session of its own, and its variables; rank 0 to stdout, which is the test's.
TELL = """
import json, os, sys
places = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK MASTER_ADDR MASTER_PORT"
variables = [*places.split(), "PL_GLOBAL_SEED", "SLURM_JOB_NAME", "OWN"]
print(json.dumps({"leads": os.getsid(0) == os.getpid()} | {name: os.environ.get(name) for name in variables}))
"""


def told(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_ranks_are_given_their_places_and_nothing_of_another_run(tmp_path, capfd, monkeypatch):
    leaked = {"MASTER_ADDR": "elsewhere", "RANK": "7", "PL_GLOBAL_SEED": "3", "SLURM_NTASKS": "1", "OWN": "mine"}
    ended = run_ranks(
        [sys.executable, "-c", TELL],
        2,
        folder=tmp_path / "run",
        cwd=tmp_path,
        environment=os.environ | leaked,
    )
    assert ended == ExitStatus(0)
    first, second = told(capfd.readouterr().out), told((tmp_path / "run/rank-1.log").read_text())
    assert (first.pop("RANK"), second.pop("RANK")) == (first.pop("LOCAL_RANK"), second.pop("LOCAL_RANK")) == ("0", "1")
    port = first["MASTER_PORT"]
    assert first == second
    assert second == {
        "leads": True,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PL_GLOBAL_SEED": None,
        "SLURM_JOB_NAME": "interactive",  # which keeps Lightning from taking the one task of the job for the only rank
        "OWN": "mine",
    }


def test_several_nodes_meet_where_the_user_says(tmp_path, capfd):
    meeting = {"NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    command = [sys.executable, "-c", TELL]
    place = dict(folder=tmp_path, cwd=tmp_path, nodes=2)
    assert run_ranks(command, 2, environment=os.environ | meeting, **place) == ExitStatus(0)
    third, fourth = (told((tmp_path / f"rank-{number}.log").read_text()) for number in (2, 3))
    assert (third["RANK"], third["WORLD_SIZE"], third["LOCAL_RANK"], third["NODE_RANK"]) == ("2", "4", "0", "1")
    assert (fourth["RANK"], fourth["MASTER_ADDR"], fourth["MASTER_PORT"]) == ("3", "node0", "29500")
    with pytest.raises(
        ValueError, match="trainer.num_nodes=2: NODE_RANK, MASTER_ADDR, MASTER_PORT not set; on each node"
    ):
        run_ranks(command, 2, **place)
    with pytest.raises(ValueError, match="NODE_RANK=2 is not one of 0 to 1"):
        run_ranks(command, 2, environment=os.environ | meeting | {"NODE_RANK": "2"}, **place)


def test_two_runs_at_once_meet_at_ports_of_their_own(tmp_path):
    with Group(tmp_path / "one", "ends", "ends") as one, Group(tmp_path / "two", "ends", "ends") as two:
        assert len(one.ports) == len(two.ports) == 1
        assert one.ports != two.ports
        for group in (one, two):  # rank 0 first: the run waits for rank 1
            group.go(0)
            group.go(1)
            code, output, _ = group.gone()
            assert (code, json.loads(output)) == (0, {"code": 0, "failed_rank": None, "error": None})


def test_a_command_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_ranks(["no-such-program"], 2, folder=tmp_path, cwd=tmp_path)


def test_a_process_whose_parent_died_before_it_could_say_so_ends(tmp_path):
    code = "import sys; from dpo_lab.distributed.launcher import set_parent_death_signal as die_with"
    code += "; die_with(9, int(sys.argv[1])); print('lives')"
    for parent, (status, output) in {os.getpid(): (0, "lives\n"), 1: (-signal.SIGKILL, "")}.items():
        command = [sys.executable, "-c", code, str(parent)]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (status, output)


def test_without_a_supervisor_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report_error("ValueError: boom", 1)
    assert list(tmp_path.iterdir()) == []
