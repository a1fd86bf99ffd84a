"""What all doors share: a config error in one line, exit codes that tell, where a run lies, and its ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab import config, launch, sweep
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.results import runs
from dpo_lab.stop import Stopped, raise_on_signals
from dpo_lab.supervisor import tell_supervisor


def open_door(door: Callable[[], None]) -> int:
    """Call a Hydra main. Exit code: 0 done, 1 failed, 2 refused before anything was done, 130 interrupted, 143 preempted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print: we print it, in one line
    raise_on_signals()
    try:
        door()
    except config.ConfigErrors as error:
        return _complain(config.explain(error), 2)
    except sweep.CellFailed as error:
        return _complain(str(error), 1)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def settle(cfg: DictConfig, body: Callable[[config.RunConfig], None]) -> None:
    """Validate `cfg`, then body(settings). What the user can mend ends the process with one line and exit code 2.

    It ends by SystemExit, since Hydra reports every other exception a second time.
    """
    try:
        body(config.validate(cfg))
    except (config.ConfigError, runs.RunRefused, BadData, NoTemplate) as error:
        tell_supervisor(str(error), 2)
        sys.exit(_complain(str(error), 2))
    except Stopped as stopped:
        tell_supervisor(f"stopped by {stopped}", stopped.exit_code)
        raise
    except Exception as error:
        tell_supervisor(f"{type(error).__name__}: {error}", 1)
        raise


def enter(
    module: str,
    settings: config.RunConfig,
    record: Mapping[str, Any],
    *,
    run: Callable[[Path], None],
    again: Callable[[Mapping[str, Any], Path], None],
    alone: bool = False,
) -> None:
    """One run of the door `module`: run(folder) here, or on as many ranks as the trainer has devices on this machine.

    record: the config as it is recorded; again(its record, folder): what a run that is done already has to say; alone: it
    needs no more than one process. Under --multirun the run is one cell of a sweep, a process of its own.
    """
    if HydraConfig.get().mode is RunMode.MULTIRUN and not launch.is_rank():
        sweep.run_cell(module)
        return
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    if launch.is_rank():
        if parent := os.environ.get(launch.PARENT):
            launch.die_with_parent(signal.SIGKILL, int(parent))
        run(folder)
        return
    if parent := os.environ.get(launch.PARENT):
        launch.die_with_parent(signal.SIGTERM, int(parent))  # a cell of a sweep: it puts its work in safety first
    print(f"dpo_lab: {folder}", flush=True)  # before the seconds that torch takes to load
    if runs.standing(folder, record, config.input_files(settings)) is runs.Standing.done:
        done = runs.read_record(folder)
        assert done is not None
        again(done, folder)
        return
    trainer = settings.trainer
    try:
        ranks = (
            1
            if alone
            else launch.local_world(str(trainer["accelerator"]), trainer["devices"], int(trainer["num_nodes"]))
        )
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    if ranks == 1:
        run(folder)
    else:
        _run_ranks(module, folder, ranks, int(trainer["num_nodes"]))


def command_of(module: str, folder: Path) -> list[str]:
    """The command line that runs this Hydra job again, as one run and in `folder`."""
    hydra = HydraConfig.get()
    searched = [
        arg for s in hydra.runtime.config_sources if s.provider == "command-line" for arg in ("--config-dir", s.path)
    ]
    return [
        *(sys.executable, "-m", module, *searched, "--config-name", str(hydra.job.config_name)),
        *hydra.overrides.task,
        *hydra.overrides.hydra,
        "hydra.mode=RUN",
        f"hydra.run.dir='{os.path.relpath(folder, hydra.runtime.cwd)}'",
    ]


def _run_ranks(module: str, folder: Path, ranks: int, nodes: int) -> None:
    """Start the ranks and see to it that they end together; end as they did."""
    cwd = Path(HydraConfig.get().runtime.cwd)
    try:
        ended = launch.run_ranks(command_of(module, folder), ranks, folder=folder, cwd=cwd, nodes=nodes)
    except Stopped as stopped:
        runs.close(folder, stopped.status, f"stopped by {stopped}")
        raise
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    if ended.code == 0:
        return
    if ended.code != 2:  # refused: nothing was begun
        stopped = ended.code in (130, 143)
        runs.close(folder, Stopped(ended.code - 128).status if stopped else "failed", str(ended.error))
    sys.exit(ended.code)


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
