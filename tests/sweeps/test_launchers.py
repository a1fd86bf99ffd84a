"""Launchers: how a sweep's jobs run at once, as a scheduler's jobs and on Ray. Real processes, nothing imitated but SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dpo_lab.config import schema
from dpo_lab.sweeps import sweeper
from tests.conftest import SMALL
from tests.support import warm
from tests.support.processes import patience
from tests.support.sweeping import (
    ENVIRONMENT,
    behaves,
    is_alive,
    members,
    openers,
    record,
    said,
    started,
    starts,
    statuses,
    sweep,
    told,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.extended]

CONF = Path(schema.conf_dir())


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
@pytest.mark.parametrize("command", ["train", "sft"])
def test_every_launcher_composes(name, command):
    sweeper.register(schema.as_record)
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            command, [f"launcher={name}", "trainer.devices=2", "trainer.accelerator=gpu"], return_hydra_config=True
        )
    launcher = cfg.hydra.launcher
    if name == "slurm":
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (1, 2, 2)
        cfg.trainer.accelerator = "cpu"
        assert launcher.gpus_per_node is None
    if name == "ray":
        assert launcher.remote.num_gpus == 2
    assert cfg.hydra.sweeper._target_ == f"{sweeper.NAMESPACE}.JobSweeper"


@pytest.mark.parametrize(
    ("name", "extra"), [("joblib", "joblib"), ("slurm", "slurm"), ("slurm_local", "slurm"), ("ray", "ray")]
)
def test_a_launcher_without_its_package_says_what_to_install(name, extra, tmp_path):
    code = (
        "import importlib.util, sys, types\n"
        "sys.modules['hydra_plugins'] = types.ModuleType('hydra_plugins')\n"
        "sys.modules['hydra_plugins'].__path__ = []\n"  # as if no plugin were installed
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
        "from dpo_lab import train\n"
        "sys.exit(train.main())\n"
    )
    command = [sys.executable, "-c", code, "--multirun", "beta=0.1,0.2", f"launcher={name}"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"its package is not installed; type pip install 'dpo_lab[{extra}]'")


def test_joblib_runs_two_jobs_at_once_and_stops_them_together(tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1,0.2,0.3", "launcher=joblib") as parent:
        until(lambda: all("waiting" in said(tmp_path, f"beta=0.{n}/seed=0") for n in (1, 2)))
        os.killpg(parent.pid, signal.SIGTERM)  # to all its processes, as a terminal and a scheduler do it
        assert parent.wait(patience(60)) == 143
    assert statuses(tmp_path) == ["preempted", "preempted", "not started"]
    assert [record(tmp_path, f"beta=0.{n}/seed=0")["error"][-7:] for n in (1, 2)] == ["SIGTERM"] * 2
    assert "the launcher failed" not in (tmp_path / "terminal.log").read_text()
    (tmp_path / "go").touch()
    again = sweep(tmp_path, "beta=0.1,0.2,0.3", "launcher=joblib")
    assert again.returncode == 0, again.stdout
    assert "3 jobs: 2 resumed, 1 done." in again.stdout


def test_joblib_whose_driver_is_killed_leaves_no_process(tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1,0.2", "launcher=joblib") as parent:
        until(lambda: all("waiting" in said(tmp_path, f"beta=0.{n}/seed=0") for n in (1, 2)))
        workers = members(parent.pid)
        parent.kill()
        parent.wait()
        until(lambda: not any(is_alive(pid) for pid in (*workers, *(s["pid"] for s in starts(tmp_path)))), 20)
    assert [record(tmp_path, f"beta=0.{n}/seed=0")["status"] for n in (1, 2)] == ["preempted", "preempted"]


def test_joblib_gives_a_job_gpus_of_its_own_and_its_share_of_the_threads(tmp_path):
    behaves(tmp_path, beta_0="waits")
    gpus = ["trainer.accelerator=gpu", "trainer.devices=2", "threads=null", "launcher=joblib"]
    with started(tmp_path, "beta=0.1,0.2", *gpus, CUDA_VISIBLE_DEVICES="0,1,2,3") as parent:
        until(lambda: {s["gpus"] for s in starts(tmp_path)} == {"0,1", "2,3"})
        (tmp_path / "go").touch()
        assert parent.wait(patience(60)) == 0
    assert {s["threads"] for s in starts(tmp_path)} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_a_requeued_job_starts_again_and_goes_on(tmp_path):
    """submitit's own signal, as SLURM sends it: the job notes where it is, goes back into the queue and is started anew."""
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1", "launcher=slurm_local") as parent:
        until(lambda: told(tmp_path)["status"] == "running" and len(starts(tmp_path)) == 1)
        until(lambda: said_by_job(tmp_path) == 1)
        os.kill(starts(tmp_path)[0]["pid"], signal.SIGUSR2)
        until(lambda: len(starts(tmp_path)) == 2)
        (tmp_path / "go").touch()
        assert parent.wait(patience(60)) == 0
    assert statuses(tmp_path) == ["done"]
    assert len({s["pid"] for s in starts(tmp_path)}) == 2


def said_by_job(folder: Path) -> int:
    """How often a job of submitit's came to wait."""
    return sum(path.read_text().count("waiting") for path in (folder / "outputs/dpo/.submitit").glob("*/*.out"))


def test_jobs_are_stopped_with_the_sweep(tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1,0.2", "launcher=slurm_local") as parent:
        until(lambda: said_by_job(tmp_path) == 2)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(patience(60)) == 143
    assert statuses(tmp_path) == ["interrupted", "interrupted"]
    assert not any(is_alive(start["pid"]) for start in starts(tmp_path))


def test_a_job_that_fails_or_is_killed_is_named_and_the_other_runs(tmp_path):
    behaves(tmp_path, **{"beta_0.1/": "fails", "beta_0.2/": "killed"})
    result = sweep(tmp_path, "beta=0.1,0.2,0.3", "launcher=slurm_local")
    assert result.returncode == 1
    assert statuses(tmp_path) == ["failed", "failed", "done"]
    errors = [job["error"] for job in told(tmp_path)["jobs"]]
    assert errors[:2] == ["ValueError: the loss is not finite", "the process that ran it was killed"]
    assert all((tmp_path / job["log"]).exists() for job in told(tmp_path)["jobs"][:2])


SBATCH = """#!{python}
# What SLURM does with a job of two tasks, as far as submitit and we can tell.
import os, re, shlex, subprocess, sys
script = open(sys.argv[1]).read()
open("job.sh", "w").write(script)
command = next(line for line in script.splitlines() if line.startswith("srun"))
command = shlex.split(command.replace("%t", "0").replace("%j", "77").replace("%A_%a", "77"))
python = command.index(next(word for word in command if "python" in word))
for rank in range(2):
    variables = dict(SLURM_JOB_ID="77", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS="2", SLURM_NODEID="0")
    variables |= dict(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="here")
    subprocess.Popen(command[python:], env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=open("task.log", "a"))
print("Submitted batch job 77")
"""
SACCT = "#!{python}\nprint('JobID|State|NodeList\\n77|COMPLETED|here')\n"


def test_under_slurm_the_tasks_of_a_job_are_its_ranks_and_run_in_place(tmp_path):
    """SLURM's commands are imitated: what is asked of it, and what runs in its tasks, is ours and submitit's."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n"), ("sacct", SACCT)):
        (tools / name).write_text(text.replace("{python}", sys.executable))
        (tools / name).chmod(0o755)
    size = ["trainer=ddp_cpu", "launcher=slurm", "hydra.launcher.partition=long"]
    result = sweep(tmp_path, "beta=0.1", *size, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    job = (tmp_path / "job.sh").read_text()
    for line in ("--nodes=1", "--ntasks-per-node=2", "--partition=long", "--time=1440", "--signal=USR2@120"):
        assert f"#SBATCH {line}" in job
    assert "gpus" not in job
    assert [s["argv"][-1] for s in starts(tmp_path)] == [starts(tmp_path)[0]["argv"][-1]] * 2  # submitit's folder
    assert sorted(s["rank"] for s in starts(tmp_path)) == ["0", "1"]
    assert statuses(tmp_path) == ["done"]


def test_a_requeued_training_ends_as_if_it_had_not_been_interrupted(tmp_path):
    settings = [*SMALL, "trainer.max_steps=40", "trainer.val_check_interval=20"]
    whole = warm.run_module("dpo_lab.train", *settings, "name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    with started(tmp_path, *settings, "name=dpo", "launcher=slurm_local", module="dpo_lab.train") as parent:
        folder = tmp_path / until(lambda: told(tmp_path))["jobs"][0]["folder"]
        until(lambda: (folder / "metrics.jsonl").read_text().count("\n") > 2)
        (task,) = openers(folder / "output.log")
        os.kill(task, signal.SIGUSR2)
        assert parent.wait(patience(240)) == 0
    (other,) = tmp_path.glob("outputs/whole/*/seed=0")
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_ray_runs_jobs_names_those_that_fail_and_stops_them(tmp_path):
    behaves(tmp_path, **{"beta_0.1/": "fails", "beta_0.2/": "waits"})
    with started(tmp_path, "beta=0.1,0.2", "launcher=ray", "hydra.launcher.init.num_cpus=2") as parent:
        until(lambda: "waiting" in said(tmp_path, "beta=0.2/seed=0") and "failed" in statuses(tmp_path))
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(patience(60)) == 143, (tmp_path / "terminal.log").read_text()
    assert statuses(tmp_path) == ["failed", "preempted"]
    assert told(tmp_path)["jobs"][0]["error"] == "ValueError: the loss is not finite"
    assert not any(is_alive(start["pid"]) for start in starts(tmp_path))
