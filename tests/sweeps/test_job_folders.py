"""Where the jobs of a sweep lie: names that begin with what is swept, and runs that were started under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_lab.config.schema import conf_dir
from dpo_lab.sweeps.job_folders import SUBDIR, JobFolders, named
from tests.support.sweeping import run, starts, sweep, told

LEFT_OUT = ["seed", "name", "trainer.max_steps"]


def test_names_begin_with_what_is_swept_and_only_hash_what_all_share():
    beta = ["beta=0.1", "seed=1"]
    assert named(beta, [], LEFT_OUT) == "beta=0.1"
    assert named(beta, ["seed=1", "name=a", "trainer.max_steps=9"], LEFT_OUT) == "beta=0.1"
    hashed = named(["optim.lr=1", *beta], ["policy.path=a/b c", "evals=study"], LEFT_OUT)
    assert hashed == named(["optim.lr=1", *beta], ["evals=study", "policy.path=a/b c"], LEFT_OUT)
    assert hashed is not None
    assert hashed[:-8] == "beta=0.1,optim.lr=1-"
    assert named(["trainer.max_steps=9"], [], LEFT_OUT) == "trainer.max_steps=9"
    assert named(["seed=1"], ["beta=0.1"], LEFT_OUT) is None
    assert hashed != named(["optim.lr=1", *beta], ["evals=study", "policy.path=c"], LEFT_OUT)


@pytest.mark.parametrize("command", ["train", "sft", "reward_model"])
def test_each_command_names_folders_by_the_template_that_is_known(command):
    assert OmegaConf.to_container(OmegaConf.load(f"{conf_dir()}/{command}.yaml").hydra.sweep)["subdir"] == SUBDIR  # type: ignore[index]


def config(beta: float = 0.1, steps: int = 5, devices: int = 1) -> dict[str, Any]:
    return {"beta": beta, "seed": 0, "trainer": {"max_steps": steps, "devices": devices}}


def left(folder: Path, record: dict[str, Any], **files: Any) -> Path:
    folder = folder / "seed=0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "done", "config": record, "files": files}))
    return folder


def test_a_run_is_continued_where_it_was_started(tmp_path):
    old = left(tmp_path / "optim.lr=1,beta=0.1", config())
    jobs = [config(), config(beta=1.0)]
    folders = JobFolders(tmp_path, jobs, extends=True, shares=False)
    assert [folders.choose(f"{n}-abc", job, ()) for n, job in enumerate(jobs)] == [old, tmp_path / "1-abc" / "seed=0"]
    again = JobFolders(tmp_path, jobs, extends=True, shares=False)
    assert again.choose("a", config(), ()) == old
    assert again.choose("b", config(), ()) == tmp_path / "b" / "seed=0"  # each job has a folder of its own
    left(tmp_path / "a", config(beta=2.0))  # what lies in its own folder is judged there
    assert JobFolders(tmp_path, jobs, extends=True, shares=False).choose("a", config(), ()).parent.name == "a"


def test_a_run_without_a_trajectory_does_not_stand_for_one_with_it(tmp_path):
    traced = config() | {"evals": {"every": 20, "num_trajectory_prompts": 128}}
    left(tmp_path / "old", config() | {"evals": {"num_prompts": 8}})  # of a version that had none
    own = JobFolders(tmp_path, [traced], extends=True, shares=False).choose("a", traced, ())
    assert own == tmp_path / "a" / "seed=0"
    left(tmp_path / "older", traced)
    assert JobFolders(tmp_path, [traced], extends=True, shares=False).choose("a", traced, ()).parent.name == "older"


def test_a_run_of_fewer_steps_is_the_same_run_only_where_steps_are_not_compared(tmp_path):
    left(tmp_path / "a", config(steps=3))
    four = left(tmp_path / "b", config(steps=4))
    job = config(steps=5)
    assert JobFolders(tmp_path, [job], extends=True, shares=False).choose("new", job, ()) == four
    assert JobFolders(tmp_path, [job], extends=False, shares=False).choose("new", job, ()).parent.name == "new"
    assert (
        JobFolders(tmp_path, [job], extends=True, shares=False).choose("new", config(steps=2), ()).parent.name == "new"
    )


def test_runs_of_another_budget_count_if_nothing_differs(tmp_path):
    other, own, file = tmp_path / "quick", tmp_path / "full", tmp_path / "pairs.jsonl"
    file.write_text("{}")
    read = {"bytes": 2, "mtime_ns": file.stat().st_mtime_ns, "blake2b": ""}
    done = left(other / "x", config(), **{str(file): read})
    left(other / "y", config(steps=4, beta=1.0))

    def choose(job: dict[str, Any]) -> Path:
        return JobFolders(own, [job], [other], extends=True, shares=True).choose("new", job, [file])

    assert choose(config()) == done
    assert choose(config(beta=1.0)) == own / "new" / "seed=0"  # it has fewer steps
    file.write_text('{"prompt": "a"}')
    assert choose(config()) == own / "new" / "seed=0"


def test_arms_that_differ_only_by_how_they_are_run_stay_apart(tmp_path):
    jobs = [config(devices=1), config(devices=2), config(devices=2)]
    left(tmp_path / "old", jobs[1])
    folders = JobFolders(tmp_path, jobs, extends=False, shares=True)
    found = [folders.choose(f"new{n}", job, ()).parent.name for n, job in enumerate(jobs)]
    assert found == ["new0", "old", "old"]


@pytest.mark.slow
@pytest.mark.extended
def test_a_sweep_of_an_earlier_version_is_gone_on_with(tmp_path):
    """Its folders were named by all overrides; one of its two runs had been done."""
    arguments = ("beta=0.1,0.2", "optim.lr=1e-5")
    assert run("tests.support.standin", tmp_path, "beta=0.1", "optim.lr=1e-5").returncode == 0
    (old,) = (tmp_path / "outputs" / "dpo").iterdir()
    assert old.name == "beta=0.1,optim.lr=1e-5"
    result = sweep(tmp_path, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "outputs/dpo: 2 jobs: 1 done already, 1 new" in result.stdout
    first, second = (Path(job["folder"]).parent.name for job in told(tmp_path)["jobs"])
    assert (first, second[:-8]) == (old.name, "beta=0.2-")
    assert len(starts(tmp_path)) == 2
    assert "2 jobs: 2 skipped." in sweep(tmp_path, *arguments).stdout
    beside = sweep(tmp_path, "beta=0.2,0.3", "optim.lr=1e-6")  # another sweep, whose runs lie beside these
    assert beside.returncode == 0, beside.stdout + beside.stderr
    assert len(list((tmp_path / "outputs" / "dpo").glob("*/seed=0/run.json"))) == 4
