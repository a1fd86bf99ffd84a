"""A study's folder and record, `study.json`: what was predicted, when, and the state of its jobs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.redact import redact_override
from dpo_lab.runs.run_record import now, slug
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.studies.archive import FOLDER, path_of
from dpo_lab.studies.load import RunSet, gather
from dpo_lab.studies.spec import RECORD, Arm, Prediction, Study, StudyError, present_study
from dpo_lab.studies.verdicts import decide
from dpo_lab.sweeps import study_rounds
from dpo_lab.sweeps.job_status import Outcome
from dpo_lab.sweeps.plan import Job, Wanted, not_shared


class StudyRun:
    """A study under one budget: its record and its folder `root`/NAME/BUDGET, named also by the user's overrides.

    Its runs are in `root`/runs/..., shared by all studies, so that equal arms run once.
    """

    def __init__(
        self,
        study: Study,
        file: Path,
        budget: str,
        overrides: Sequence[str],
        root: Path,
        command: str,
        max_seeds: int | None = None,
    ) -> None:
        """max_seeds: add seeds after those of the study, one look after each, until it is decided or has so many. An arm
        gets no further seed once the predictions about it are decided.
        """
        self.study, self._file = study, file
        self.folder = root / study.name / slug(",".join([budget, *overrides]))
        self._record: dict[str, Any] = {
            "schema": 1,
            "study": study.as_record(),
            "file": os.path.relpath(file),
            "budget": budget,
            "overrides": [redact_override(override) for override in overrides],
            "command": command,
            "status": "registered",
            "registrations": [],
            "jobs": [],
        }
        self.order: Sequence[int] = study.seeds  # in which seeds are added, as many as there may be
        self.places: dict[tuple[str, int], None] = {}  # arm and seed of each job, in the order of `wanted`
        self.arms_left = {arm.name for arm in study.arms}  # that get further seeds
        rule = study_rounds.stopping(study.seeds, max_seeds or study_rounds.MAX_SEEDS)
        self.all_arms: int = rule["all_arms"]  # seeds that every arm has, if seeds are added
        if max_seeds is not None:
            self.order = study_rounds.seeds_in_order(study.seeds, max_seeds)
            self._record |= {"stopping": rule, "looks": []}
            self._take_up(rule)

    def _take_up(self, rule: Mapping[str, Any]) -> None:
        """Take up the jobs and looks of the same study under the same stopping rule; else begin with one seed.

        The seeds of a round that was interrupted are all run before the next look, so no decision depends on it.
        """
        earlier = self._earlier()
        is_same = [entry["digest"] for entry in earlier.get("registrations", ())][-1:] == [self.study.digest(rule)]
        if is_same:
            self._record |= {"looks": earlier["looks"], "jobs": earlier["jobs"]}
            newest = earlier["study"]["seeds"][-1]
            self.arms_left = {job["arm"] for job in earlier["jobs"] if job["seed"] == newest} or self.arms_left
        self.grow(len(earlier["study"]["seeds"]) if is_same else 1)

    @property
    def adds_seeds(self) -> bool:
        """Whether seeds are added until the study is decided."""
        return "stopping" in self._record

    def grow(self, number: int) -> None:
        """Have the first `number` seeds in order, as many as there may be at most."""
        self.study = replace(self.study, seeds=list(self.order[:number]))
        self._record["study"] = self.study.as_record()

    def look(self) -> list[tuple[Prediction, Verdict]]:
        """Look at the verdicts after every seed that was added since the last look; return the last ones."""
        (collection,) = gather([self.folder])
        self._record["looks"] = study_rounds.looks(collection, self._record["looks"])
        self._write()
        judged = decide(collection)
        if len(self.study.seeds) >= self.all_arms:
            self.arms_left = study_rounds.arms_left(self.study, judged)
        return judged

    def wanted(self) -> list[Wanted]:
        """Return the jobs beyond those that it returned before: of every arm that is left, seed by seed, so that an
        interrupted study has runs of all of them.
        """
        arms = self.study.arms
        swept = dict(zip((arm.name for arm in arms), not_shared([arm.overrides for arm in arms]), strict=True))
        overrides = {arm.name: arm.overrides for arm in arms}
        resumed = [(job["arm"], job["seed"]) for job in self._record["jobs"]]
        left = [(arm.name, seed) for seed in self.study.seeds for arm in arms if arm.name in self.arms_left]
        new = [place for place in dict.fromkeys([*resumed, *left]) if place not in self.places]
        self.places |= dict.fromkeys(new)
        return [
            Wanted(f"{self.study.name}: {arm}, seed {seed}", [*overrides[arm], f"seed={seed}"], swept[arm])
            for arm, seed in new
        ]

    def earlier(self) -> RunSet | None:
        """Return the finished runs of this study's arms in its folder, else those of its archived record; else None.

        Arms are the same whatever points of their trajectories are measured.
        """
        archived = path_of(self._file.parent / FOLDER, self.study.name, self._record["budget"])
        for path in (self.folder, archived):
            if (path / RECORD).exists() or path.is_file():
                found = gather([path])[0]
                typed = {arm.name: _trained_with(arm) for arm in found.arms}
                same = {arm.name for arm in self.study.arms if typed.get(arm.name) == _trained_with(arm)}
                if runs := [run for run in found.runs if run.is_done and run.arm in same]:
                    return replace(found, arms=self.study.arms, runs=runs)
        return None

    def register(self) -> None:
        """Record the study's predictions before the first run.

        Earlier registrations are kept; a changed study is registered in addition, with its own time. Raises StudyError for
        fixed seeds where the study has added seeds before, whose looks would be lost.
        """
        earlier = self._earlier()
        if "stopping" in earlier and not self.adds_seeds:
            raise StudyError(
                f"{self.folder}: this study adds seeds until it is decided; type until=decided to go on with it, or move"
                f" {self.folder / RECORD} away, which leaves the runs unchanged"
            )
        registered = earlier.get("registrations", [])
        digest = self.study.digest(self._record.get("stopping"))
        if not registered or registered[-1]["digest"] != digest:
            registered = [*registered, {"digest": digest, "at": now()}]
        self._record["registrations"] = registered
        self._write()

    def register_first(self) -> None:
        """Register the study unless it was registered before."""
        if not self._earlier():
            self.register()

    def write_status(self, status: str, outcomes: Sequence[tuple[Job, Outcome | None]]) -> None:
        """Record the status of the study and the folders and outcomes of its jobs, in the order of `wanted`."""
        self._record["status"] = status
        self._record["jobs"] = [
            {
                "arm": arm,
                "seed": seed,
                "folder": os.path.relpath(job.folder, self.folder),
                "overrides": [redact_override(override) for override in job.overrides],
                "status": outcome.status if outcome else "not started",
                "error": outcome.error if outcome else None,
                "log": os.path.relpath(outcome.log, self.folder) if outcome and outcome.log else None,
            }
            for (arm, seed), (job, outcome) in zip(self.places, outcomes, strict=True)
        ]
        self._write()

    def _earlier(self) -> dict[str, Any]:
        path = self.folder / RECORD
        try:
            return present_study(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError) as error:
            raise StudyError(
                f"{path}: can't be read ({error}); move it away, which leaves the runs unchanged"
            ) from None

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / RECORD, json.dumps(self._record, indent=1, allow_nan=False))


def _trained_with(arm: Arm) -> list[str]:
    return [override for override in arm.overrides if not override.startswith("evals.every=")]
