"""One cell of a sweep as a fresh process: the same door with the cell's overrides, in RUN mode.

Lightning's DDP starts its ranks by repeating the command line; under --multirun that repeats the sweep. A cell of its own
has nothing to repeat but itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from dpo_lab.launch import DDP_VARIABLES, PARENT, stop


class CellFailed(RuntimeError):
    """A cell ended without a committed result."""


def run_cell(module: str, grace: float = 30.0) -> None:
    """Run the current Hydra job of the door `module` in a child process and wait for it. Raises CellFailed if it fails."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    searched = [
        arg for s in hydra.runtime.config_sources if s.provider == "command-line" for arg in ("--config-dir", s.path)
    ]
    command = [
        *(sys.executable, "-m", module, *searched, "--config-name", str(hydra.job.config_name)),
        *hydra.overrides.task,
        *hydra.overrides.hydra,
        "hydra.mode=RUN",
        f"hydra.run.dir='{os.path.relpath(folder, hydra.runtime.cwd)}'",
    ]
    print(f"[{hydra.job.num}] {' '.join(map(shlex.quote, hydra.overrides.task)) or '(no overrides)'}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in DDP_VARIABLES} | {PARENT: str(os.getpid())}
    child = subprocess.Popen(command, env=environment, cwd=hydra.runtime.cwd, start_new_session=True)
    try:
        code = child.wait()
    except BaseException:
        stop(child, signal.SIGINT, grace)
        raise
    if code:
        raise CellFailed(f"{folder}: the run ended with exit code {code}")
