"""The sweeper of studies: every arm under every seed as one sweep, shared between studies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from dpo_lab.config.schema import ConfigError
from dpo_lab.studies.spec import StudyError
from dpo_lab.sweeps import plan
from dpo_lab.sweeps.study_plan import show_outlook
from dpo_lab.sweeps.study_run import StudyRun
from dpo_lab.sweeps.sweeper import NAMESPACE, CellSweeper
from dpo_lab.terminal.progress import plain_console

NAME = "StudySweeper"


class StudySweeper(CellSweeper):
    """Runs the cells of `studies`, each once though several need it; what a cell is, its overrides alone say.

    beside: studies that may share runs with them: what they predict is registered too, before any run. only_plan: say what
    would be run, what it may cost and what it could show, and run nothing.
    """

    studies: ClassVar[Sequence[StudyRun]] = ()
    beside: ClassVar[Sequence[StudyRun]] = ()
    only_plan: ClassVar[bool] = False

    def sweep(self, arguments: list[str]) -> NoReturn:
        """Ends the process, with the exit code of the sweep. arguments: what holds for all cells, none of it swept."""
        arguments = self.with_params(arguments)
        console = plain_console(soft_wrap=not sys.stdout.isatty())
        parsed = OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(arguments)
        if swept := [override.input_line for override in parsed if override.is_sweep_override()]:
            raise ConfigError(
                f"{swept[0]}: a study's arms are those of its file; type one value, or put it there as a sweep"
            )
        for study in self.studies:
            _refuse_swept(study, self._context.config_loader)
        wanted = [(title, [*arguments, *own]) for study in self.studies for title, own in study.wanted]
        unique: dict[tuple[str, ...], tuple[str, list[str]]] = {}
        for title, overrides in wanted:
            unique.setdefault(tuple(sorted(overrides)), (title, overrides))
        cells = self.plan(list(unique.values()), console)
        of = dict(zip(unique, cells, strict=True))
        places = iter([of[tuple(sorted(overrides))] for _, overrides in wanted])
        parts = [(study, [next(places) for _ in study.wanted]) for study in self.studies]
        if self.only_plan:
            show_outlook(console, cells, parts)
            sys.exit(0)
        for study in self.beside:
            study.register_first()
        for study, own in parts:
            study.register()
            study.note("running", [(cell, None) for cell in own])
        code, outcomes = self.run(cells, console)
        by_cell = {id(outcome.cell): outcome for outcome in outcomes}
        for study, own in parts:
            found = [(cell, by_cell[id(cell)]) for cell in own]
            whole = all(outcome.status == "done" for _, outcome in found)
            study.note("done" if whole else "failed" if code == 1 else "stopped", found)
        sys.exit(code)


def _refuse_swept(study: StudyRun, loader: plan.ConfigLoader) -> None:
    for arm in study.study.arms:
        for override in OverridesParser.create(config_loader=loader).parse_overrides(arm.overrides):
            if override.is_sweep_override():
                raise StudyError(f"arm '{arm.name}': {override.input_line} has several values; type them as its sweep")


def register(studies: Sequence[StudyRun], beside: Sequence[StudyRun], only_plan: bool) -> None:
    """Make the sweeper known to Hydra as the one of these studies."""
    StudySweeper.studies, StudySweeper.beside, StudySweeper.only_plan = studies, beside, only_plan
    Plugins.instance().class_name_to_class[f"{NAMESPACE}.{NAME}"] = StudySweeper
