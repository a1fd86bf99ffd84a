"""A plugin in the processes that a command starts: ranks, jobs of sweeps and studies, and a run that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OFFLINE, python_m
from tests.plugins.conftest import OWN
from tests.plugins.project import TINY, make
from tests.support.processes import contained
from tests.support.small_fit import step_of
from tests.support.sweeping import ENVIRONMENT, until

pytestmark = [pytest.mark.slow, pytest.mark.extended]

LOSSES = ["plugins=my_lab", "data=my_lab_colours", *TINY]


def records(project: Path, name: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted((project / "outputs" / name).rglob("run.json"))]
    assert all(record["status"] == "done" for record in found)
    return found


def test_two_ranks_learn_what_one_does(project, done):
    told = python_m("dpo_lab.train", *OWN[:-1], "name=ranks", *TINY, "trainer=ddp_cpu", cwd=project, **ENVIRONMENT)
    assert told.returncode == 0, told.stdout + told.stderr
    (ranks,), one = records(project, "ranks"), json.loads((done / "run.json").read_text())
    assert len(ranks["ranks"]) == 2
    assert ranks["plugins"] == one["plugins"]
    for metric in ("margin", "kl", "gold", "distinct_openings"):
        assert ranks["metrics"][metric]["value"] == pytest.approx(one["metrics"][metric]["value"], rel=1e-4)


@pytest.mark.ranks
def test_torchrun_s_ranks_load_it(project):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dpo_lab.train", *LOSSES]
    command += ["loss=my_lab_hinge", "name=torchrun", "trainer=ddp_cpu"]
    told = subprocess.run(command, cwd=project, env=os.environ | OFFLINE | ENVIRONMENT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    (record,) = records(project, "torchrun")
    assert (len(record["ranks"]), record["config"]["loss"]["kind"]) == (2, "my_lab_hinge")


@pytest.mark.parametrize("launcher", ["local", "joblib", "slurm_local", "ray"])
def test_the_jobs_of_a_sweep_load_it(launcher, project):
    words = ["--multirun", *LOSSES, "loss=dpo,my_lab_hinge", f"launcher={launcher}", f"name={launcher}"]
    told = python_m("dpo_lab.train", *words, cwd=project, **ENVIRONMENT)
    assert told.returncode == 0, told.stdout + told.stderr
    found = records(project, launcher)
    assert [record["config"]["loss"]["kind"] for record in found] == ["dpo", "my_lab_hinge"]
    assert all("my_lab" in record["plugins"] for record in found)
    again = python_m("dpo_lab.train", *words, cwd=project, **ENVIRONMENT)
    assert "2 jobs: 2 done already" in again.stdout


def test_a_process_whose_plugin_has_changed_since_its_parent_imported_it_refuses(project):
    inherited = json.dumps({"my_lab": ["my_lab", "another hash"]})
    told = python_m("dpo_lab.train", "loss=my_lab_hinge", cwd=project, **ENVIRONMENT, DPO_LAB_PLUGINS=inherited)
    says = f"error: plugins=[my_lab]: {project / 'my_lab'} has changed since the command was typed; type it again\n"
    assert (told.returncode, told.stderr) == (2, says)


def test_a_file_outside_of_the_current_folder_is_found_where_it_is_typed(project, tmp_path):
    """By a path relative to where it is typed, in a worker that is started elsewhere in memory and time."""
    (tmp_path / "desk").mkdir()
    (tmp_path / "my_losses.py").write_text((project / "my_lab" / "losses.py").read_text())
    words = ["--multirun", "plugins=[../my_losses.py]", "loss=my_lab_hinge", "beta=0.1,0.2", *TINY, "launcher=joblib"]
    told = python_m("dpo_lab.train", *words, cwd=tmp_path / "desk", **ENVIRONMENT)
    assert told.returncode == 0, told.stdout + told.stderr
    typed = [record["plugins"]["my_losses"]["typed"] for record in records(tmp_path / "desk", "dpo")]
    assert typed == ["../my_losses.py"] * 2


def test_the_project_s_study_runs_and_is_reported(project):
    words = ["studies/my_lab_hinge.yaml", "budget=quick", "plugins=my_lab", "data=my_lab_colours", *TINY]
    told = python_m("dpo_lab.study", *words, cwd=project, **ENVIRONMENT)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "Is a hinge enough?" in told.stdout
    found = records(project, "studies")
    assert sorted((record["config"]["loss"]["kind"], record["config"]["seed"]) for record in found) == [
        ("dpo", 0),
        ("dpo", 1),
        ("my_lab_hinge", 0),
        ("my_lab_hinge", 1),
    ]


def test_a_run_that_was_killed_goes_on_with_it_and_not_with_another(tmp_path):
    project = make(tmp_path)
    words = [
        *OWN,
        *TINY,
        "trainer.max_steps=400",
        "callbacks.checkpoint.every_n_steps=2",
        "callbacks.checkpoint.save_total_limit=2",
    ]

    def checkpoints() -> list[Path]:
        return sorted((project / "outputs" / "own").rglob("step=*.ckpt"), key=step_of)

    with contained(os.environ | OFFLINE | ENVIRONMENT) as environment:
        command = [sys.executable, "-m", "dpo_lab.train", *words]
        process = subprocess.Popen(
            command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        until(lambda: checkpoints() and step_of(checkpoints()[-1]) >= 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = step_of(checkpoints()[-1])
    assert reached < 400
    source = project / "my_lab" / "losses.py"
    text = source.read_text()
    source.write_text(text + "\n# changed\n")
    told = python_m("dpo_lab.train", *words, cwd=project, **ENVIRONMENT)
    assert told.returncode == 2
    assert "plugin my_lab has changed since" in told.stderr
    source.write_text(text)
    told = python_m("dpo_lab.train", *words, cwd=project, **ENVIRONMENT)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "resuming from " in told.stdout + told.stderr
    (record,) = records(project, "own")
    assert (record["steps"], len(record["attempts"])) == (400, 1)
    rows = [json.loads(line) for line in next(project.rglob("metrics.jsonl")).read_text().splitlines()]
    assert [row["step"] for row in rows if "weight_norm" in row] == [*range(2, 401, 2)]
