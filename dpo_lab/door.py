"""What all doors share: a config error in one line, exit codes that tell, and where a run lies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab import config, sweep
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.launch import die_with_parent
from dpo_lab.results.runs import RunRefused


def open_door(door: Callable[[], None]) -> int:
    """Call a Hydra main. Exit code: 0 done, 1 failed, 2 refused before anything was done, 130 interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print: we print it, in one line
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        door()
    except config.ConfigErrors as error:
        return _complain(config.explain(error), 2)
    except sweep.CellFailed as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return 130
    return 0


def settle(cfg: DictConfig, body: Callable[[config.RunConfig], None]) -> None:
    """Validate `cfg`, then body(settings). What the user can mend ends the process with one line and exit code 2.

    It ends by SystemExit, since Hydra reports every other exception a second time.
    """
    try:
        body(config.validate(cfg))
    except (config.ConfigError, RunRefused, BadData, NoTemplate) as error:
        sys.exit(_complain(str(error), 2))


def run_folder(module: str) -> Path | None:
    """Where this run of the door `module` lies; None under --multirun, where the run was one cell, a process of its own."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        sweep.run_cell(module)
        return None
    if os.environ.get(sweep.CHILD) and "LOCAL_RANK" not in os.environ:
        die_with_parent(signal.SIGTERM)
    return Path(os.path.relpath(HydraConfig.get().runtime.output_dir))


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
