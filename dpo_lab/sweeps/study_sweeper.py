"""The sweeper of studies: every arm under every seed as one sweep, shared between studies."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from dpo_lab.config.schema import ConfigError
from dpo_lab.studies.spec import StudyError
from dpo_lab.sweeps import plan, study_rounds
from dpo_lab.sweeps.job_status import Outcome
from dpo_lab.sweeps.study_plan import show_outlook
from dpo_lab.sweeps.study_run import StudyRun
from dpo_lab.sweeps.sweeper import NAMESPACE, JobSweeper
from dpo_lab.terminal.progress import plain_console

NAME = "StudySweeper"


class StudySweeper(JobSweeper):
    """A sweeper that runs the jobs of `studies`; jobs with equal settings run once, also those of other budgets.

    beside: studies that may share runs with them, whose predictions are registered too, before any run. only_plan:
    print the jobs, their cost and the effect that they could detect, and run nothing.
    """

    studies: ClassVar[Sequence[StudyRun]] = ()
    beside: ClassVar[Sequence[StudyRun]] = ()
    only_plan: ClassVar[bool] = False

    def sweep(self, arguments: list[str]) -> NoReturn:
        """Run the studies and exit with the sweep's code. arguments: overrides of all jobs, with one value each."""
        arguments = self.with_params(arguments)
        console = plain_console(soft_wrap=not sys.stdout.isatty())
        parsed = OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(arguments)
        if swept := [override.input_line for override in parsed if override.is_sweep_override()]:
            raise ConfigError(
                f"{swept[0]}: the arms of a study are those in its file; type one value, or add a sweep to the file"
            )
        for study in self.studies:
            _check_arms(study, self._context.config_loader)
        self._arguments, self._console = arguments, console
        self._jobs: dict[Path, plan.Job] = {}
        self._own: dict[StudyRun, list[plan.Job]] = {study: [] for study in self.studies}
        self._left = [study for study in self.studies if study.adds_seeds]
        if not self.only_plan:
            self._grow(by_round=False)
        jobs = self._planned()
        if self.only_plan:
            show_outlook(console, jobs, [*self._own.items()])
            sys.exit(0)
        code, outcomes = self.run(jobs, console, self._more if self._left else None, self._register)
        for study in self.studies:
            results = self._results(study, outcomes)
            is_done = all(outcome is not None and outcome.status == "done" for _, outcome in results)
            is_done &= study not in self._left
            study.write_status("done" if is_done else "failed" if code == 1 else "stopped", results)
        sys.exit(code)

    def _register(self) -> None:
        """Register all predictions before the first run."""
        for study in self.beside:
            study.register_first()
        for study, own in self._own.items():
            study.register()
            study.write_status("running", [(job, None) for job in own])

    def _grow(self, by_round: bool) -> None:
        """Add a round's seeds to the studies that are left; in the first round they may have them already."""
        if self._left:
            number = study_rounds.seeds_a_round(sum(len(of.arms_left) for of in self._left), self.workers)
        for of in self._left:
            begun = len(of.study.seeds)
            of.grow(begun + number if by_round else max(begun, number))

    def _planned(self) -> list[plan.Job]:
        """Plan the runs that the studies want beyond those planned; return the new jobs, each once."""
        wanted = {study: study.wanted() for study in self.studies}
        every = [replace(one, overrides=[*self._arguments, *one.overrides]) for of in wanted.values() for one in of]
        known = set(self._jobs)
        found = iter(self.plan(every, self._console, sweeps_beside=_of_all_budgets) if every else [])
        for study, of in wanted.items():
            self._own[study] += [self._jobs.setdefault(job.folder, job) for job in itertools.islice(found, len(of))]
        return [job for folder, job in self._jobs.items() if folder not in known]

    def _results(self, study: StudyRun, outcomes: Sequence[Outcome]) -> list[tuple[plan.Job, Outcome | None]]:
        """Return the jobs of a study, each with its outcome if it has run."""
        by_folder = {outcome.job.folder: outcome for outcome in outcomes}
        return [(job, by_folder.get(job.folder)) for job in self._own[study]]

    def _more(self, outcomes: Sequence[Outcome]) -> list[plan.Job]:
        """Return the jobs of the next round: a further seed, or several, for every study that is not over."""
        jobs: list[plan.Job] = []
        while self._left and not jobs:  # all runs of a round may be those of another study
            self._left = [study for study in self._left if self._goes_on(study, self._results(study, outcomes))]
            self._grow(by_round=True)
            jobs = self._planned()
            for study in self._left:
                study.write_status("running", self._results(study, outcomes))
        return jobs

    def _goes_on(self, study: StudyRun, results: Sequence[tuple[plan.Job, Outcome | None]]) -> bool:
        """Look at a study's verdicts, print a line for each, and return whether it adds seeds."""
        study.write_status("running", results)
        judged, number, most = study.look(), len(study.study.seeds), len(study.order)
        newest = study.study.seeds[-1]
        of_newest = [outcome for (_, seed), (_, outcome) in zip(study.places, results, strict=True) if seed == newest]
        if all(outcome is None or outcome.status != "done" for outcome in of_newest):
            end = f"no run of seed {newest} is done, so no seed is added"
        elif study_rounds.is_decided(judged):
            end = "decided"
        else:
            end = "undecided, and no seed is left" if number >= most else ""
        going, every = len(study.arms_left), len(study.study.arms)
        note = end or (f"{going} of {every} arms go on" if going < every else "")
        head = f"{study.study.title}: {number} of at most {most} seeds{f'; {note}' if note else ''}"
        for line in (head, *(f"  {line}" for line in study_rounds.lines(judged))):
            self._console.print(line, markup=False, highlight=False)
        return not end


def _of_all_budgets(sweep: Path) -> list[Path]:
    """Return the folders of the runs of other budgets, beside that of this one."""
    return sorted(folder for folder in sweep.parent.glob("*/") if folder != sweep)


def _check_arms(study: StudyRun, loader: plan.ConfigLoader) -> None:
    """Raise StudyError if an override of an arm has several values."""
    for arm in study.study.arms:
        for override in OverridesParser.create(config_loader=loader).parse_overrides(arm.overrides):
            if override.is_sweep_override():
                raise StudyError(f"arm '{arm.name}': {override.input_line} has several values; type them as its sweep")


def register(studies: Sequence[StudyRun], beside: Sequence[StudyRun], only_plan: bool) -> None:
    """Register the sweeper with Hydra, for these studies."""
    StudySweeper.studies, StudySweeper.beside, StudySweeper.only_plan = studies, beside, only_plan
    Plugins.instance().class_name_to_class[f"{NAMESPACE}.{NAME}"] = StudySweeper
