"""A study's folder and record, `study.json`: what was predicted, when, and the state of its jobs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.redact import redact_override
from dpo_lab.runs.run_record import now, slug
from dpo_lab.studies.archive import FOLDER, path_of
from dpo_lab.studies.load import RunSet, gather
from dpo_lab.studies.spec import RECORD, Study, StudyError, present_study
from dpo_lab.sweeps.job_status import Outcome
from dpo_lab.sweeps.plan import Job, Wanted, not_shared


class StudyRun:
    """A study under one budget: its record and its folder `root`/NAME/BUDGET, named also by the user's overrides.

    Its runs are in `root`/runs/..., shared by all studies, so that equal arms run once.
    """

    def __init__(
        self, study: Study, file: Path, budget: str, overrides: Sequence[str], root: Path, command: str
    ) -> None:
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

    @property
    def wanted(self) -> list[Wanted]:
        """Every arm, seed by seed, so that an interrupted study has runs of all arms."""
        arms = list(zip(self.study.arms, not_shared([arm.overrides for arm in self.study.arms]), strict=True))
        return [
            Wanted(f"{self.study.name}: {arm.name}, seed {seed}", [*arm.overrides, f"seed={seed}"], swept)
            for seed in self.study.seeds
            for arm, swept in arms
        ]

    def earlier(self) -> RunSet | None:
        """Return the runs in the study's folder, else those in the archived record beside its file, else None."""
        archived = path_of(self._file.parent / FOLDER, self.study.name, self._record["budget"])
        for path in (self.folder, archived):
            if (path / RECORD).exists() or path.is_file():
                return gather([path])[0]
        return None

    def register(self) -> None:
        """Record the study's predictions before the first run.

        Earlier registrations are kept; a changed study is registered in addition, with its own time.
        """
        registered = self._earlier().get("registrations", [])
        digest = self.study.digest()
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
        places = [(arm.name, seed) for seed in self.study.seeds for arm in self.study.arms]
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
            for (arm, seed), (job, outcome) in zip(places, outcomes, strict=True)
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
