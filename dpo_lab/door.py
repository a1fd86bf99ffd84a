"""What all doors share: a config error in one line, exit codes that tell, and where a run lies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab import config
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.launch import die_with_parent
from dpo_lab.results import runs
from dpo_lab.results.runs import RunRefused
from dpo_lab.stop import Stopped, raise_on_signals
from dpo_lab.sweep import cell, sweeper


def open_door(door: Callable[[], None]) -> int:
    """Call a Hydra main. Exit code: 0 done, 1 failed, 2 refused before anything was done, 130 or 143 stopped."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print: we print it, in one line
    raise_on_signals()
    sweeper.register()
    try:
        door()
    except config.ConfigErrors as error:
        return _complain(config.explain(error), 2)
    except (config.ConfigError, RunRefused) as error:
        return _complain(str(error), 2)
    except cell.CellFailed as error:
        return _complain(str(error), 1)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def settle(cfg: DictConfig, body: Callable[[config.RunConfig], None]) -> float | None:
    """Validate `cfg`, then body(settings). What the user can mend ends the process with one line and exit code 2.

    It ends by SystemExit, since Hydra reports every other exception a second time. A cell of a sweep gives its objective.
    """
    is_cell = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        settings = config.validate(cfg)
        with cell.in_place(_is_done(cfg, settings)) if is_cell and cell.is_task() else nullcontext():
            body(settings)
        return cell.value(settings.objective) if is_cell else None
    except (config.ConfigError, RunRefused, BadData, NoTemplate) as error:
        if is_cell:
            raise cell.CellFailed(str(error)) from None
        sys.exit(_complain(str(error), 2))


def run_folder(module: str, cfg: DictConfig, settings: config.RunConfig) -> Path | None:
    """Where this run of the door `module` lies; None under --multirun, where the run was one cell, a process of its own."""
    if HydraConfig.get().mode is RunMode.MULTIRUN and not cell.is_task():
        cell.run_cell(module, settings, _is_done(cfg, settings))
        return None
    if (waiting := os.environ.pop(cell.CHILD, None)) is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != int(waiting):  # it died before the kernel was asked to tell
            raise Stopped(signal.SIGTERM)
    return Path(os.path.relpath(HydraConfig.get().runtime.output_dir))


def _is_done(cfg: DictConfig, settings: config.RunConfig) -> Callable[[], bool]:
    """Whether the run of these settings is done, for the current Hydra job; as often as it is asked."""
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    record, files = config.as_record(cfg, settings), config.input_files(settings)
    return lambda: runs.standing(folder, record, files) is runs.Standing.done


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
