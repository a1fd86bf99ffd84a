"""The sweeper of studies: every arm under every seed as one sweep, shared between studies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from dpo_lab.config.schema import ConfigError
from dpo_lab.studies.spec import StudyError
from dpo_lab.sweeps import plan
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
        wanted = [
            replace(own, overrides=[*arguments, *own.overrides]) for study in self.studies for own in study.wanted
        ]
        in_order = self.plan(wanted, console, sweeps_beside=_of_all_budgets)
        unique: dict[Path, plan.Job] = {}
        in_order = iter([unique.setdefault(job.folder, job) for job in in_order])
        jobs = list(unique.values())
        parts = [(study, [next(in_order) for _ in study.wanted]) for study in self.studies]
        if self.only_plan:
            show_outlook(console, jobs, parts)
            sys.exit(0)
        for study in self.beside:
            study.register_first()
        for study, own in parts:
            study.register()
            study.write_status("running", [(job, None) for job in own])
        code, outcomes = self.run(jobs, console)
        by_job = {id(outcome.job): outcome for outcome in outcomes}
        for study, own in parts:
            results = [(job, by_job[id(job)]) for job in own]
            is_done = all(outcome.status == "done" for _, outcome in results)
            study.write_status("done" if is_done else "failed" if code == 1 else "stopped", results)
        sys.exit(code)


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
