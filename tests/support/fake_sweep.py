"""Studies whose runs take no time: the sweeper of studies itself, over a launcher that writes records of chosen numbers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_lab.runs import run_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.spec import Study
from dpo_lab.sweeps import plan
from dpo_lab.sweeps.study_run import StudyRun
from dpo_lab.sweeps.study_sweeper import StudySweeper

Metrics = Callable[[str, int], Mapping[str, float]]  # of an arm and a seed


class Killed(BaseException):
    """The process ends here, and nothing after it happens."""


class FakeSweeper(StudySweeper):
    """metrics(arm's name, seed): what its run measures, a ValueError if it fails; kill_after: runs before the process is
    killed in the midst of the next; stop_after: runs before it is asked to stop; workers: of the launcher.
    """

    def __init__(
        self,
        root: Path,
        metrics: Metrics,
        kill_after: int | None = None,
        stop_after: int | None = None,
        workers: int = 1,
    ) -> None:
        self.root, self.metrics, self.left, self.workers = root, metrics, kill_after, workers
        self.stop_after = stop_after
        self._context = SimpleNamespace(config_loader=None)  # pyright: ignore[reportAttributeAccessIssue]
        self.started: list[str] = []
        self.params = {}

    def plan(self, wanted: Sequence[plan.Wanted], console: Any, **options: Any) -> list[plan.Job]:
        jobs = []
        for one in wanted:
            *_, arm, seed = one.overrides
            record = {"trainer": {"max_steps": 1}, "if_exists": "error", "arm": arm, "seed": int(seed[5:])}
            folder = self.root / "runs" / arm / seed
            jobs.append(plan.Job(tuple(one.overrides), one.title, self.root / "runs", folder, record, ()))
        self.jobs = getattr(self, "jobs", {}) | {job.overrides: job for job in jobs}
        return jobs

    def _launcher(self, count: int) -> Any:
        return self

    def launch(self, batch: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        for overrides in batch:
            job = self.jobs[tuple(overrides)]
            if self.left == 0:
                job.folder.mkdir(parents=True, exist_ok=True)
                raise Killed
            self.left = None if self.left is None else self.left - 1
            self.started.append(f"{job.record['arm']}/{job.record['seed']}")
            record = {"config": dict(job.record), "overrides": [], "started": run_record.now(), "status": "done"}
            try:
                found = self.metrics(job.record["arm"].partition("=")[2], job.record["seed"])
                record["metrics"] = {
                    k: Estimate(v, 0.01, 9, (v - 0.02, v + 0.02)).as_record() for k, v in found.items()
                }
            except ValueError as error:
                record |= {"status": "failed", "error": str(error)}
            job.folder.mkdir(parents=True, exist_ok=True)
            if len(self.started) == self.stop_after:
                signal.raise_signal(signal.SIGTERM)
            part = job.folder / "run.json.part"
            part.write_text(json.dumps(record))
            part.replace(job.folder / "run.json")  # the sweep's monitor reads it meanwhile


def run_studies(
    root: Path, studies: Sequence[Study], metrics: Metrics, max_seeds: int | None = 24, **options: Any
) -> tuple[int | None, list[dict[str, Any]], list[str]]:
    """Run studies; return the exit code (None if the process was killed), each study.json, and the runs that started."""
    made = [StudyRun(of, root / f"{of.name}.yaml", "full", [], root, "command", max_seeds) for of in studies]
    sweeper = FakeSweeper(root, metrics, **options)
    code: Any = None
    sweeper.studies = made  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with pytest.raises(SystemExit) as ended:
            sweeper.sweep([])
        code = ended.value.code
    except Killed:
        pass
    return code, [json.loads((one.folder / "study.json").read_text()) for one in made], sweeper.started
