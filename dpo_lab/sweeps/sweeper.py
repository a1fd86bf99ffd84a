"""A Hydra sweeper: validates all jobs before the first starts, skips finished ones, survives failures, and reports.

Parsing and launching stay Hydra's. Nothing here imports torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dpo_lab.config.schema import ConfigError
from dpo_lab.distributed.signals import StopRequest, StopSignal
from dpo_lab.runs.run_record import RunStatus
from dpo_lab.sweeps import plan, summary
from dpo_lab.sweeps.job import max_parallel_jobs
from dpo_lab.sweeps.job_status import JobStatusStore, first_line, is_process_dead
from dpo_lab.sweeps.monitor import ProgressMonitor
from dpo_lab.sweeps.ray_launcher import RayLauncher, check
from dpo_lab.terminal.progress import plain_console

# Hydra takes plugins from its own namespaces only; the files in conf/hydra say these names.
NAMESPACE = "hydra_plugins.dpo_lab"


def register(as_record: plan.AsRecord) -> None:
    """Make our plugins known to Hydra, and the resolver that the launchers' YAML files use.

    as_record: how the runs of this door record their config.
    """
    CellSweeper.as_record = staticmethod(as_record)
    for plugin in (CellSweeper, RayLauncher):
        Plugins.instance().class_name_to_class[f"{NAMESPACE}.{plugin.__name__}"] = plugin
    OmegaConf.register_new_resolver("gpus_per_node", _gpus_per_node, replace=True)


class CellSweeper(Sweeper):
    """Runs every combination of the swept values that is not done yet, by the launcher that was chosen."""

    as_record: plan.AsRecord

    def __init__(self, params: Mapping[str, Any] | None = None, **unknown: Any) -> None:
        """params: swept values by key, as Hydra's own sweeper takes them from a YAML file; the command line comes first."""
        self.params, self._unknown = params or {}, unknown

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        for key, value in self._unknown.items():
            raise ConfigError(
                f"hydra.sweeper.{key}={value}: this sweeper has the setting hydra.sweeper.params alone; leave it out, or"
                " type hydra/sweeper=basic"
            )
        self._context, self._task, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> NoReturn:
        """Ends the process: exit code 0 when all cells are done, 1 when some are not, 128 + signal when it was stopped.

        Raises ConfigError and RunRefused before anything was done.
        """
        console = plain_console(soft_wrap=not sys.stdout.isatty())
        wanted = plan.combinations(self.with_params(arguments), self._context.config_loader)
        code, _ = self.run(self.plan(wanted, console), console)
        sys.exit(code)

    def with_params(self, arguments: Sequence[str]) -> list[str]:
        """Return the overrides of `params`, then those of the command line, which replace them key by key."""
        return [*(f"{key}={value}" for key, value in self.params.items()), *arguments]

    def plan(self, wanted: Sequence[tuple[str, Sequence[str]]], console: Console) -> list[plan.Job]:
        """The cells of `wanted`, (title, overrides) each."""
        with console.status("planning the cells"):
            return plan.plan(wanted, self._config, self._context.config_loader, self.as_record)

    def run(self, cells: list[plan.Job], console: Console) -> tuple[int, list[summary.Outcome]]:
        """Run what is not done of the cells; gives the exit code, and what became of each."""
        desk = JobStatusStore(cells[0].sweep)
        with desk.held():
            return self._run(cells, plan.each(cells, plan.Job.standing), desk, console)

    def _run(
        self, cells: list[plan.Job], were: list[RunStatus], desk: JobStatusStore, console: Console
    ) -> tuple[int, list[summary.Outcome]]:
        todo = [cell for cell, was in zip(cells, were, strict=True) if was is not RunStatus.done]
        launcher = self._launcher(len(todo)) if todo else None
        folder, started, error = desk.folder, summary.now(), None
        console.print(f"{folder}: {_count(were)}")
        for cell in todo:
            desk.forget(cell.folder)
        look = lambda is_over=False: summary.outcomes(cells, were, desk, is_over)  # noqa: E731
        keep = lambda found: summary.write(folder, found, started, "running")  # noqa: E731
        with StopRequest() as request:
            keep(look())
            if launcher is not None:
                with ProgressMonitor(console, desk, look, keep, request):
                    error = _launch(launcher, todo)
                    while error and not request.signum and any(_is_here(desk.read(cell.folder)) for cell in todo):
                        time.sleep(1)  # a job ended it for all, though the others go on
            found = look(is_over=True)
        code = summary.exit_code(found, request.signum)
        status = {0: "done", 1: "failed"}.get(code, "stopped")
        summary.write(folder, found, started, status, error)
        summary.show(console, folder, found, error)
        return code, found

    def _launcher(self, jobs: int) -> Launcher:
        node = self._config.hydra.launcher
        if "Ray" in node._target_:
            check()
        if "n_jobs" in node:
            node.n_jobs = min(max_parallel_jobs(node), jobs)  # no worker without a cell
        return Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=self._task, config=self._config
        )


def _launch(launcher: Launcher, cells: Sequence[plan.Job]) -> str | None:
    """Hand the cells to the launcher; gives what the launcher itself, not a cell, failed of."""
    try:
        launcher.launch([list(cell.overrides) for cell in cells], initial_job_idx=0)  # how they ended is in their notes
    except StopSignal:
        pass  # a second SIGINT: the summary says how far the cells came
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _is_here(note: Mapping[str, Any] | None) -> bool:
    """Whether a cell runs on this machine."""
    return note is not None and note["status"] == "running" and is_process_dead(note) is False


def _count(were: Sequence[RunStatus]) -> str:
    words = {RunStatus.done: "done already", RunStatus.unfinished: "to be resumed", RunStatus.new: "new"}
    counts = {word: were.count(standing) for standing, word in words.items()}
    return f"{len(were)} cells: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _gpus_per_node(accelerator: str, devices: Any) -> int | None:
    """What SLURM is asked for: as many GPUs as ranks a node, none for CPU ranks."""
    return None if accelerator == "cpu" else int(devices)
