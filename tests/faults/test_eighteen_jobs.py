"""A real sweep of eighteen jobs on two ranks each, killed three times at drawn moments, ends as if it never had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import SMALL, python_m
from tests.support.processes import patience
from tests.support.sweeping import until

TINY = [s for s in SMALL if not s.startswith(("evals.", "data.validation_pairs"))]
TINY += "evals.num_prompts=4 evals.num_texts=2 data.validation_pairs=12 callbacks.checkpoint.every_n_steps=1".split()
# Six minutes of two cores: run by `WHOLE_SWEEP=1 make test ARGS=tests/faults/test_eighteen_jobs.py`, and skipped else.
WHOLE = bool(os.environ.get("WHOLE_SWEEP"))
BETAS, SEEDS, KILLS = (0.01, 0.1, 1.0), (0, 1, 2), 3
ABLATIONS = ("none", "uniform_ref")
JOBS = len(BETAS) * len(ABLATIONS) * len(SEEDS)
AXES = {"beta": BETAS, "+ablation": ABLATIONS, "seed": SEEDS}
COMMAND = ["--multirun", *(f"{key}={','.join(map(str, values))}" for key, values in AXES.items())]
COMMAND += ["trainer=ddp_cpu", "name=eighteen"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not WHOLE, reason="takes six minutes; type WHOLE_SWEEP=1 before the command"),
]


class Sweep:
    """The sweep as processes and folders. Its processes are all that carry its mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"EIGHTEEN_JOBS={folder}"
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "EIGHTEEN_JOBS": str(folder)}

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "dpo_lab.train", *COMMAND, *TINY]
        with (self.folder / "sweep.log").open("a") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def processes(self) -> list[int]:
        """Those that live: not zombies, whose parent here is this test."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile, or not ours to read
        return found

    def records(self) -> dict[Path, dict]:
        return {
            path.parent: json.loads(path.read_text())
            for path in sorted(self.folder.glob("outputs/eighteen/*/*/run.json"))
        }

    def done(self) -> dict[Path, bytes]:
        return {
            run: (run / "run.json").read_bytes() for run, record in self.records().items() if record["status"] == "done"
        }


# What a job that goes on has reached, from its record and its folder.
REACHED: dict[str, Callable[[Path, dict], bool]] = {
    "begun": lambda run, record: record["status"] == "running",
    "saved": lambda run, record: record["status"] == "running" and any((run / "checkpoints").glob("step=[345].ckpt")),
    "trained": lambda run, record: record["status"] == "running" and "steps" in record,
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Sweep, list[dict[Path, bytes]]]:
    """The sweep after three kills and a last start that was left alone; what was done already at each kill."""
    sweep, drawn, were_done = Sweep(tmp_path_factory.mktemp("eighteen")), random.Random(5), []
    counts = sorted(drawn.sample(range(1, JOBS - 2), KILLS))
    moments = zip(counts, drawn.sample(sorted(REACHED), KILLS), strict=True)
    for number, (finished, reached) in enumerate(moments):
        parent = sweep.start()

        def is_the_moment(parent=parent, finished: int = finished, reached: str = reached) -> bool:
            records = sweep.records()
            count = sum(record["status"] == "done" for record in records.values())
            at_work = [REACHED[reached](run, record) for run, record in records.items()]
            return parent.poll() is not None or count > finished or (count == finished and any(at_work))

        until(is_the_moment, 400)
        assert parent.poll() is None, (sweep.folder / "sweep.log").read_text()
        if number == 0:
            parent.kill()  # the sweep alone: its job saves, and nothing is left
        else:
            for process in sweep.processes():  # as when the machine goes down
                os.kill(process, signal.SIGKILL)
        parent.wait()
        until(lambda: not sweep.processes(), 20)  # none is left
        were_done.append(sweep.done())
    last = sweep.start()
    assert last.wait(patience(400)) == 0, (sweep.folder / "sweep.log").read_text()
    return sweep, were_done


def test_35_a_sweep_that_is_killed_again_and_again_repeats_nothing_and_loses_nothing(swept):
    sweep, were_done = swept
    assert [len(done) for done in were_done] == sorted({len(done) for done in were_done})  # each start came further
    after = sweep.done()
    assert len(after) == JOBS
    for done in were_done:
        assert {run: after[run] for run in done} == done  # no byte of a finished run changed
    told = json.loads((sweep.folder / "outputs" / "eighteen" / "sweep.json").read_text())
    assert (told["status"], [job["status"] for job in told["jobs"]]) == ("done", ["done"] * JOBS)
    assert sum(job["previous_status"] == "done" for job in told["jobs"]) == len(were_done[-1])


def test_each_job_ran_its_own_config_on_both_ranks(swept):
    sweep, _ = swept
    records = list(sweep.records().values())
    arms = {(r["config"]["beta"], r["config"]["reference"]["kind"], r["config"]["seed"]) for r in records}
    assert arms == set(product(BETAS, ("cached", "uniform"), SEEDS))
    for record in records:
        assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
        assert {rank["config"] for rank in record["ranks"]} == {record["config_digest"]}
        assert len({rank["pid"] for rank in record["ranks"]}) == 2
    assert len({record["config_digest"] for record in records}) == JOBS
    for seed in SEEDS:  # arms are paired
        same = [record["identity"] for record in records if record["config"]["seed"] == seed]
        assert same == [same[0]] * (len(BETAS) * len(ABLATIONS))


def test_what_was_interrupted_ends_as_if_it_had_not_been(swept):
    sweep, _ = swept
    interrupted = {run: record for run, record in sweep.records().items() if record.get("starts")}
    assert len(interrupted) == KILLS
    assert {start["status"] for record in interrupted.values() for start in record["starts"]} & {"running", "preempted"}
    for run, record in list(interrupted.items())[:2]:
        config = record["config"]
        ablation = "none" if config["reference"]["kind"] == "cached" else "uniform_ref"
        arm = [
            f"beta={config['beta']}",
            f"+ablation={ablation}",
            f"seed={config['seed']}",
            "trainer=ddp_cpu",
            "name=twin",
        ]
        result = python_m("dpo_lab.train", *arm, *TINY, cwd=sweep.folder)
        assert result.returncode == 0, result.stderr
        twin = sweep.folder / result.stdout.splitlines()[0].removeprefix("dpo_lab: ")
        undisturbed = json.loads((twin / "run.json").read_text())
        for what in ("metrics", "trained_policy", "samples", "identity", "steps"):
            assert json.dumps(record[what]) == json.dumps(undisturbed[what])
        assert (run / "metrics.jsonl").read_bytes() == (twin / "metrics.jsonl").read_bytes()


def test_a_sweep_that_is_done_starts_no_process(swept):
    sweep, _ = swept
    before = sweep.done()
    result = python_m("dpo_lab.train", *COMMAND, *TINY, cwd=sweep.folder)
    assert result.returncode == 0
    assert f"{JOBS} skipped" in result.stdout
    assert sweep.done() == before
