"""A Hydra sweeper: validates all jobs before the first starts, skips finished ones, survives failures, and reports.

Parsing and launching stay Hydra's. Nothing here imports torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dpo_lab.config.schema import ConfigError
from dpo_lab.distributed.signals import StopRequest, StopSignal
from dpo_lab.errors import first_line
from dpo_lab.runs.run_record import RunStatus, now
from dpo_lab.sweeps import plan, summary
from dpo_lab.sweeps.job import max_parallel_jobs
from dpo_lab.sweeps.job_status import Outcome, StatusReader, SweepFolder, is_alive
from dpo_lab.sweeps.monitor import monitor
from dpo_lab.sweeps.ray_launcher import RayLauncher, check
from dpo_lab.terminal.progress import plain_console

# Hydra accepts plugins from its own namespace only; the files in conf/hydra use these names.
NAMESPACE = "hydra_plugins.dpo_lab"


def register(as_record: plan.AsRecord) -> None:
    """Register this package's plugins with Hydra, and the resolver that the launchers' YAML files use.

    as_record: returns the config as the runs of this command record it.
    """
    JobSweeper.as_record = staticmethod(as_record)
    for plugin in (JobSweeper, RayLauncher):
        Plugins.instance().class_name_to_class[f"{NAMESPACE}.{plugin.__name__}"] = plugin
    OmegaConf.register_new_resolver("gpus_per_node", _gpus_per_node, replace=True)


class JobSweeper(Sweeper):
    """A sweeper that runs every combination of the swept values that is not done yet, on the chosen launcher."""

    as_record: plan.AsRecord

    def __init__(self, params: Mapping[str, Any] | None = None, **unknown: Any) -> None:
        """params: swept values by key, from a YAML file, as in Hydra's sweeper; the command line takes precedence."""
        self.params, self._unknown = params or {}, unknown

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        for key, value in self._unknown.items():
            raise ConfigError(
                f"hydra.sweeper.{key}={value}: this sweeper's only setting is hydra.sweeper.params; leave it out, or"
                " type hydra/sweeper=basic"
            )
        self._context, self._task, self._config = hydra_context, task_function, config
        node = config.hydra.launcher
        self.workers = max_parallel_jobs(node) if "n_jobs" in node else 1  # jobs at once on this machine

    def sweep(self, arguments: list[str]) -> NoReturn:
        """Run the sweep and exit: code 0 if all jobs are done, 1 if some are not, 128 + signal if it was stopped.

        Raises ConfigError and RunRefused before any job starts.
        """
        console = plain_console(soft_wrap=not sys.stdout.isatty())
        wanted = plan.combinations(self.with_params(arguments), self._context.config_loader)
        code, _ = self.run(self.plan(wanted, console), console)
        sys.exit(code)

    def with_params(self, arguments: Sequence[str]) -> list[str]:
        """Return the overrides in `params`, then those of the command line, which take precedence."""
        return [*(f"{key}={value}" for key, value in self.params.items()), *arguments]

    def plan(self, wanted: Sequence[plan.Wanted], console: Console, **options: Any) -> list[plan.Job]:
        """Return the jobs for `wanted`. options: of plan.plan."""
        with console.status("planning the jobs"):
            return plan.plan(wanted, self._config, self._context.config_loader, self.as_record, **options)

    def run(
        self,
        jobs: list[plan.Job],
        console: Console,
        more: Callable[[Sequence[Outcome]], list[plan.Job]] | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> tuple[int, list[Outcome]]:
        """Run the jobs that are not done, then those that `more` adds; return the exit code and each job's outcome.

        more(outcomes of all jobs so far): called after each round of jobs, until it returns no job. If a signal comes first,
        the code is 128 + signal even if all jobs so far are done. begin(): called when no other sweep has these jobs any more.
        """
        sweep, started, error = SweepFolder(jobs[0].sweep), now(), None
        ended: list[Outcome] = []
        with sweep.lock(), StopRequest() as request:
            begin()
            while jobs:
                statuses = plan.each(jobs, plan.Job.run_status)
                todo = [job for job, status in zip(jobs, statuses, strict=True) if status is not RunStatus.done]
                launcher = self._launcher(len(todo)) if todo else None
                console.print(f"{sweep.path}: {_counts(statuses)}")
                if not ended and len(jobs) > 1 and (shared := summary.shared_overrides(jobs)):
                    console.print(f"all: {' '.join(shared)}", markup=False, highlight=False)
                reader = StatusReader(jobs, statuses)
                save = partial(_save, sweep.path, started, tuple(ended))
                save(reader.outcomes())
                if launcher is not None:
                    with monitor(console, sweep, reader, save, request):
                        error = _launch(launcher, todo)
                        while error and not request.signum and any(is_alive(job.folder) for job in todo):
                            time.sleep(1)  # an error of one job ended the launcher while others still run
                ended += reader.outcomes(is_over=True)
                jobs = more(ended) if more is not None and request.signum is None and error is None else []
            code = summary.exit_code(ended, request.signum)
            if more is not None and request.signum is not None:
                code = 128 + request.signum
            status = {0: "done", 1: "failed"}.get(code, "stopped")
            summary.write(sweep.path, ended, started, status, error)
            summary.show(console, sweep.path, ended, error)
        return code, ended

    def _launcher(self, count: int) -> Launcher:
        """Return the chosen launcher, with at most `count` workers."""
        node = self._config.hydra.launcher
        if "Ray" in node._target_:
            check()
        if "n_jobs" in node:
            node.n_jobs = min(self.workers, count)
        return Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=self._task, config=self._config
        )


def _save(folder: Path, started: str, before: Sequence[Outcome], outcomes: Sequence[Outcome]) -> None:
    """Write the record of a sweep in progress. before: outcomes of earlier rounds."""
    summary.write(folder, [*before, *outcomes], started, "running")


def _launch(launcher: Launcher, jobs: Sequence[plan.Job]) -> str | None:
    """Launch the jobs; return the error of the launcher itself, None if there is none."""
    try:
        # Their outcomes are in their records and logs.
        launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=0)
    except StopSignal:
        pass  # a second SIGINT: the summary shows how far the jobs are
    except Exception as error:
        return first_line(f"{type(error).__name__}: {error}")
    return None


def _counts(statuses: Sequence[RunStatus]) -> str:
    words = {RunStatus.done: "done already", RunStatus.unfinished: "to be resumed", RunStatus.new: "new"}
    counts = {word: statuses.count(status) for status, word in words.items()}
    return f"{len(statuses)} jobs: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _gpus_per_node(accelerator: str, devices: Any) -> int | None:
    """Return the GPUs per node to request from SLURM: one per rank, None for ranks on CPUs."""
    return None if accelerator == "cpu" else int(devices)
