"""Sweeps: what is planned, refused, skipped and remembered; how they are stopped; what they tell. Real processes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dpo_lab.runs.run_record import RunStatus
from dpo_lab.sweeps import job as job_module
from dpo_lab.sweeps.job import JobFailed, max_parallel_jobs, optimized_value
from dpo_lab.sweeps.job_status import LOG, Outcome, StatusReader, SweepFolder, open_log, write_line
from dpo_lab.sweeps.monitor import time_left, view
from dpo_lab.sweeps.plan import Job
from dpo_lab.sweeps.plan_cache import KEPT, LIMIT, PlanCache, digest_of_sources
from dpo_lab.sweeps.summary import duration, exit_code
from dpo_lab.terminal.progress import plain_console
from tests.support.processes import patience
from tests.support.sweeping import (
    ENVIRONMENT,
    behaves,
    contents,
    is_alive,
    record,
    said,
    started,
    starts,
    statuses,
    sweep,
    told,
    until,
)
from tests.support.warm import run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A folder in which a sweep of two jobs ran to its end."""
    folder = tmp_path_factory.mktemp("swept")
    result = sweep(folder, "beta=0.1,0.2", "+ablation=[uniform_ref,label_noise]")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "outputs/dpo: 2 jobs: 2 new\nall: +ablation=[uniform_ref,label_noise]\n" in result.stdout
    assert re.search(r"^\[2/2\] done  beta=0.2  \d+ s$", result.stdout, re.M)
    return folder


def test_each_job_is_a_process_of_its_own_with_exactly_its_overrides(swept):
    first, second = starts(swept)
    assert first["pid"] != second["pid"]
    assert [s["argv"] for s in (first, second)] == [
        [
            *("--config-name", "train", f"beta={beta}", "+ablation=[uniform_ref,label_noise]"),
            *("hydra.mode=MULTIRUN", "hydra.mode=RUN"),
            f"hydra.run.dir='outputs/dpo/beta={beta}-{shared}/seed=0'",
        ]
        for beta in (0.1, 0.2)
        for shared in [Path(told(swept)["jobs"][0]["folder"]).parent.name[-8:]]
    ]


def test_sweep_json_says_what_became_of_every_job(swept):
    record = told(swept)
    assert record["status"] == "done"
    assert record["command"].startswith("python -m tests.support.standin --multirun beta=0.1,0.2")
    assert record["started"] <= record["finished"]
    assert record["shared"] == ["+ablation=[uniform_ref,label_noise]"]
    for job in record["jobs"]:
        assert (swept / job["folder"] / "run.json").exists()
        assert (swept / job["log"]).read_text().startswith("=== 20")
        assert (job["previous_status"], job["status"], job["error"]) == ("new", "done", None)
        assert 0 < job["seconds"] < 60


def test_a_finished_sweep_starts_nothing_and_leaves_its_runs_alone(swept):
    before, runs = len(starts(swept)), contents(swept / told(swept)["jobs"][0]["folder"])
    result = sweep(swept, "beta=0.1,0.2", "+ablation=[uniform_ref,label_noise]")
    assert result.returncode == 0
    assert "2 jobs: 2 skipped." in result.stdout
    assert len(starts(swept)) == before
    assert contents(swept / told(swept)["jobs"][0]["folder"]) == runs


def test_the_parent_of_a_sweep_that_is_done_loads_no_torch_and_starts_no_process(tmp_path):
    """12 jobs, planned twice: to know their folders, into which finished records are put, and to skip them."""
    arguments = ["--multirun", "beta=0.1,0.2,0.3", "noise.rate=0,0.1", "seed=0,1"]
    code = (
        "import os, subprocess, sys\n"
        "from dpo_lab import train\n"
        "subprocess.Popen = None\n"
        "try: train.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'lightning', 'transformers', 'ray', 'submitit', 'joblib'} & set(sys.modules)\n"
    )
    plan_only = "from dpo_lab.sweeps import plan\nplan.each = lambda jobs, ask: sys.exit(0)\n" + code
    for program in ("import sys\n" + plan_only, code):
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (plans,) = (tmp_path / "outputs" / "cache" / "plans").glob("*.json")
        for entry in json.loads(plans.read_text()).values():
            folder = tmp_path / entry["job"]["folder"]
            folder.mkdir(parents=True, exist_ok=True)
            finished = {"status": "done", "config": entry["job"]["record"], "files": {}}
            (folder / "run.json").write_text(json.dumps(finished))
    assert "12 jobs: 12 skipped." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["beta=0.1,-1"], "job beta=-1: beta=-1.0: must be a positive number; type e.g. beta=0.1"),
        (["beta=0.1,x"], "job beta=x: beta=x: must be a number; type beta=..."),
        (
            ["beta=0.1,0.10"],
            "job beta=0.1: its folder outputs/dpo/beta=0.1/seed=0 is also that of job beta=0.1; leave one",
        ),
        (["seed=1,1"], "job seed=1: its folder outputs/dpo/default/seed=1 is also that of job seed=1; leave one"),
        (
            ["data.path=nope.jsonl", "beta=1,2"],
            "job beta=1: data.path=nope.jsonl: no such file; type the path of a file",
        ),
        (["name=a,b"], "name: a sweep has one name; run one sweep for each name"),
        (["reference=cached,nope"], "job reference=nope: reference=nope: no such choice; type reference= one of"),
        (["beta=1,2", "launcher=joblib", "trainer=ddp"], "job beta=1: trainer.devices=-1: with launcher=joblib each"),
        (
            ["trainer.devices=1,2", "launcher=slurm"],
            "job trainer.devices=2: trainer.devices: all jobs of a sweep request",
        ),
        (["beta=1,2", "hydra.sweep.subdir=${hydra.job.num}"], "hydra.sweep.subdir: a job's number or id is not known"),
    ],
)
def test_a_sweep_with_one_job_that_cannot_be_is_refused_whole(arguments, message, tmp_path):
    result = run_module("tests.support.standin", "--multirun", *arguments, cwd=tmp_path, **ENVIRONMENT)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "outputs" / "dpo").exists()
    assert starts(tmp_path) == []


def test_a_folder_that_holds_another_run_refuses_the_sweep(swept):
    before = contents(swept)
    folder = told(swept)["jobs"][0]["folder"]
    result = sweep(
        swept, "beta=0.1", "optim.lr=1e-5,1e-6", f"hydra.sweep.subdir='{folder.removeprefix('outputs/dpo/')}'"
    )
    assert result.returncode == 2
    assert "leave one of them out" in result.stderr
    one = sweep(swept, "beta=0.1", "optim.lr=1e-5", f"hydra.sweep.subdir='{folder.removeprefix('outputs/dpo/')}'")
    assert one.returncode == 2
    assert "optim.lr: was" in one.stderr
    after = contents(swept)
    assert {path for path in after if "plans" not in str(path)} == {path for path in before if "plans" not in str(path)}


def test_thirty_odd_overrides_reach_the_job_as_they_were_typed(tmp_path):
    odd = [
        "+ablation=[uniform_ref,label_noise]",
        'data.path="a b.jsonl"',
        "data.revision='it\\'s {odd}, [is it]?'",
        'data.split="<train>:$HOME"',
    ]
    (tmp_path / "a b.jsonl").touch()
    many = [f"evals.num_prompts={n}" for n in range(1, 8)] + [f"optim.warmup_steps={n}" for n in range(1, 19)]
    result = sweep(
        tmp_path,
        *odd,
        "evals.num_texts=${evals.num_prompts}",
        *many,
        "beta=0.1,0.2",
        "policy.layers=1",
        "policy.heads=2",
        "hydra.job.chdir=False",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for start, beta in zip(starts(tmp_path), ("0.1", "0.2"), strict=True):
        *argv, mode, run_mode, run_dir = start["argv"][2:]
        assert argv == [
            *odd,
            "evals.num_texts=$\\{evals.num_prompts\\}",  # as Hydra's sweeper spells it, to the same effect
            *("evals.num_prompts=7", "optim.warmup_steps=18", f"beta={beta}", "policy.layers=1", "policy.heads=2"),
            "hydra.job.chdir=False",
        ]
        assert (mode, run_mode) == ("hydra.mode=MULTIRUN", "hydra.mode=RUN")
        name = run_dir.split("'")[1].split("/")[2]
        assert len(name) <= 100
        assert re.fullmatch(r"[\w.=,-]+", name)
    config = json.loads((tmp_path / told(tmp_path)["jobs"][0]["folder"] / "run.json").read_text())["config"]
    assert config["data"]["path"] == "a b.jsonl"
    assert config["data"]["revision"] == "it's {odd}, [is it]?"
    assert config["evals"]["num_texts"] == 7
    assert config["data"]["split"] == "<train>:$HOME"


@pytest.mark.parametrize(
    ("signum", "status", "code"),
    [(signal.SIGTERM, "preempted", 143), pytest.param(signal.SIGINT, "interrupted", 130, marks=pytest.mark.extended)],
)
def test_a_sweep_that_is_stopped_lets_its_job_save_starts_no_other_and_goes_on_later(signum, status, code, tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1,0.2") as parent:
        until(lambda: "waiting" in said(tmp_path, "beta=0.1/seed=0"))
        parent.send_signal(signum)
        assert parent.wait(patience(60)) == code
    assert not is_alive(starts(tmp_path)[0]["pid"])
    assert record(tmp_path, "beta=0.1/seed=0")["status"] == status
    assert told(tmp_path)["status"] == "stopped"
    assert statuses(tmp_path) == [status, "not started"]
    assert "The same command runs the rest." in (tmp_path / "terminal.log").read_text()
    if signum == signal.SIGTERM:
        (tmp_path / "go").touch()
        again = sweep(tmp_path, "beta=0.1,0.2")
        assert again.returncode == 0
        assert "2 jobs: 1 resumed, 1 done." in again.stdout


def test_at_a_terminal_a_bar_shows_the_jobs_that_run(tmp_path):
    behaves(tmp_path, **{"beta_0.2": "waits"})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tests.support.standin", "--multirun", "beta=0.1,0.2"]
    environment = os.environ | ENVIRONMENT | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""
    while process.poll() is None or shown == "":
        try:
            shown += os.read(ours, 4096).decode()
        except OSError:
            break  # the other end is closed
        if "jobs 1/2" in shown and re.search(r"about \d+ s left", shown):
            (tmp_path / "go").touch()
    os.close(ours)
    assert process.wait(patience(60)) == 0
    assert re.search(r"jobs 1/2.*about \d+ s left", shown, re.S)
    assert "[2/2] done  beta=0.2" in shown


def outcome(status: str, seconds: float | None = None, title: str = "a", was: RunStatus = RunStatus.new) -> Outcome:
    return Outcome(Job((), title, Path("s"), Path("s") / title, {}, ()), was, status, None, seconds)


def test_the_time_left_is_that_of_the_jobs_that_ended_shared_by_those_at_once():
    found = [outcome("done", 100), outcome("done", 50), outcome("running"), *[outcome("not started")] * 3]
    assert time_left(found, at_once=1) == "about 5 min 00 s left"
    assert time_left(found, at_once=2) == "about 2 min 30 s left"
    assert time_left([outcome("running"), outcome("done", None, was=RunStatus.done)], 1) == ""
    assert [duration(s) for s in (None, 12.4, 200, 7500)] == ["", "12 s", "3 min 20 s", "2 h 05 min"]


def test_the_view_shows_the_step_of_a_running_job_by_its_journal(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1}\n{"step": 20, "train/loss": 1}\n{"step": 3')
    running = Outcome(Job((), "beta=1", tmp_path, folder, {}, ()), RunStatus.new, "running")
    console = plain_console(file=io.StringIO(), width=80)
    console.print(view([running, outcome("failed", 3)], at_once=1))
    assert isinstance(console.file, io.StringIO)
    assert "beta=1  step 20" in console.file.getvalue()
    assert "1 failed" in console.file.getvalue()


def test_the_status_of_a_job_is_that_of_its_record_and_where_it_has_none_of_its_log(tmp_path):
    job = Job((), "a", tmp_path, tmp_path / "a", {}, ())
    job.folder.mkdir()
    record = {"status": "preempted", "error": "stopped by SIGTERM", "started": "then"}
    (job.folder / "run.json").write_text(json.dumps(record))
    (job.folder / LOG).write_text("=== of an earlier sweep\n=== failed: once\n")
    reader = StatusReader([job], [RunStatus.unfinished])

    def found(is_over: bool = False) -> tuple[str, str | None]:
        (outcome,) = reader.outcomes(is_over)
        return outcome.status, outcome.error

    assert found() == found(is_over=True) == ("not started", None)
    with open_log(job.folder) as log:
        write_line(log, "2026-11-29 12:00:00 the command")
        assert found() == ("running", None)
        assert found(is_over=True) == ("running", "it is still running; the sweep does not wait for it")
        write_line(log, "failed: killed by SIGKILL")
        assert found() == ("failed", "killed by SIGKILL")
        (job.folder / "run.json").write_text(json.dumps(record | {"status": "running", "started": "now"}))
        write_line(log, "2026-11-29 12:01:00 the command again, by a scheduler")
        assert found() == ("running", None)
    assert found(is_over=True) == ("failed", "the process that ran it was killed")
    (job.folder / "run.json").write_text(json.dumps(record | {"status": "done", "error": None, "started": "now"}))
    assert found() == ("done", None)
    (job.folder / "run.json").unlink()
    assert found() == ("done", None)  # without reading it again


def test_exit_codes_tell():
    done, failed, waiting = outcome("done"), outcome("failed"), outcome("not started")
    assert exit_code([done, done], None) == 0
    assert exit_code([done, failed], None) == 1
    assert exit_code([done, waiting], None) == 1
    assert exit_code([done, waiting], signal.SIGTERM) == 143
    assert exit_code([done, done], signal.SIGINT) == 0  # it came too late to stop anything


@pytest.mark.extended  # four processes
def test_another_sweeper_skips_what_is_done_and_is_told_of_failures(tmp_path):
    """As Optuna's does, Hydra's own starts every job through the command alone."""
    behaves(tmp_path, **{"beta_0.2/": "fails"})
    earlier = SweepFolder(tmp_path / "outputs" / "dpo")
    with earlier.lock():
        earlier.request_stop(signal.SIGTERM)  # of a sweep that was stopped long ago
    first = sweep(tmp_path, "hydra/sweeper=basic", "beta=0.1,0.2")
    assert first.returncode == 1
    assert "beta=0.2/seed=0: ValueError: the loss is not finite; see outputs/dpo/beta=0.2" in first.stderr
    behaves(tmp_path)
    assert sweep(tmp_path, "hydra/sweeper=basic", "beta=0.1,0.2").returncode == 0
    assert Counter(s["argv"][2] for s in starts(tmp_path)) == {"beta=0.1": 1, "beta=0.2": 2}


def test_a_sweeper_that_optimises_is_told_the_objective(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"metrics": {"gold": {"value": 1.5}}}))
    monkeypatch.setattr(
        HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    )
    assert optimized_value(None) is None
    assert optimized_value("gold") == 1.5
    with pytest.raises(JobFailed, match="optimized_metric=glod: .* has no such metric; type one of gold"):
        optimized_value("glod")


def test_jobs_at_once():
    assert max_parallel_jobs({}) == 1
    assert max_parallel_jobs({"n_jobs": 3}) == 3
    assert max_parallel_jobs({"n_jobs": -1}) == os.cpu_count()


@pytest.fixture
def sources(tmp_path) -> list:
    """A config source whose one YAML file stands beside a package of one source."""
    for name in ("conf", "package"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf" / "a.yaml").write_text("beta: ${hydra:job.num}\n")
    (tmp_path / "package" / "a.py").write_text("beta = 1\n")
    return [SimpleNamespace(schema="file", path=str(tmp_path / "conf"), provider="main")]


def test_plans_hold_as_long_as_no_source_changes(sources, tmp_path):
    digests = [digest_of_sources(sources, tmp_path / "package")]
    for changed in (tmp_path / "conf" / "a.yaml", tmp_path / "package" / "a.py", tmp_path / "conf" / "new.yaml"):
        changed.write_text("beta: 2\n")
        digests.append(digest_of_sources(sources, tmp_path / "package"))
    assert None not in digests
    assert len(set(digests)) == 4
    (tmp_path / "conf" / "a.yaml").write_text("name: ${oc.env:USER}\n")
    assert digest_of_sources(sources, tmp_path / "package") is None
    assert digest_of_sources([SimpleNamespace(schema="pkg", path="other.conf")], tmp_path / "package") is None


def test_plans_are_recalled_by_overrides_and_not_where_a_value_may_vary(tmp_path):
    memory = PlanCache(tmp_path / "plans", "abc")
    memory.put(["beta=1"], {"folder": "x"}, [])
    memory.put(["name=${now:%H}"], {"folder": "y"}, [])
    memory.save()
    later = PlanCache(tmp_path / "plans", "abc")
    assert later.get(["beta=1"]) == {"folder": "x"}
    assert later.get(["beta=2"]) is None
    assert later.get(["name=${now:%H}"]) is None
    assert PlanCache(tmp_path / "plans", "abd").get(["beta=1"]) is None
    assert PlanCache(tmp_path / "plans", None).get(["beta=1"]) is None


def test_a_plan_is_made_anew_when_a_file_came_or_went_beside_the_data(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    memory = PlanCache(tmp_path / "plans", "abc")
    memory.put(["data.path=data"], {"folder": "x"}, [str(data / "a.jsonl")])
    memory.save()
    assert PlanCache(tmp_path / "plans", "abc").get(["data.path=data"]) == {"folder": "x"}
    (data / "b.jsonl").touch()
    os.utime(data, ns=(1, 1))
    assert PlanCache(tmp_path / "plans", "abc").get(["data.path=data"]) is None


def test_plans_of_two_sweeps_are_merged_and_old_ones_forgotten(tmp_path):
    mine, other = PlanCache(tmp_path, "abc"), PlanCache(tmp_path, "abc")
    mine.put(["a"], {"folder": "a"}, [])
    other.put(["b"], {"folder": "b"}, [])
    mine.save()
    other.save()
    assert [PlanCache(tmp_path, "abc").get([name]) for name in "ab"] == [{"folder": "a"}, {"folder": "b"}]
    for n in range(LIMIT):
        mine.put([str(n)], {}, [])
    mine.save()
    assert PlanCache(tmp_path, "abc").get(["b"]) is None
    (tmp_path / "abc.json").write_text("{torn")
    assert PlanCache(tmp_path, "abc").get(["a"]) is None
    for n in range(KEPT + 2):
        newer = PlanCache(tmp_path, f"new{n}")
        newer.put(["a"], {}, [])
        newer.save()
    assert len(list(tmp_path.glob("*.json"))) == KEPT


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        (143, ("preempted", "stopped by SIGTERM")),
        (-15, ("preempted", "stopped by SIGTERM")),
        (130, ("interrupted", "stopped by SIGINT")),
        (-9, ("failed", "killed by SIGKILL")),
        (1, ("failed", "ended with exit code 1")),
        (0, ("failed", "ended without a result")),
    ],
)
def test_a_job_that_leaves_no_record_is_judged_by_its_exit_code(code, ending, tmp_path):
    (tmp_path / LOG).write_text("=== the command\n")
    assert job_module._ending(tmp_path, None, code, lambda: False) == ending
