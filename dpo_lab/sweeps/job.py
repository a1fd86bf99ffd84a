"""One job of a sweep as a process of its own: the same command with the job's overrides, and how it ended.

Lightning's DDP starts its ranks by repeating the command line; under --multirun that repeats the sweep. A cell of its own
has nothing to repeat but itself. Under SLURM a cell's ranks are the job's tasks: there it runs in place.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dpo_lab.config.schema import RunConfig
from dpo_lab.distributed.launcher import DDP_VARIABLES, PARENT, set_parent_death_signal, stop
from dpo_lab.distributed.resource_locks import acquire_gpus, threads_per_job
from dpo_lab.distributed.signals import STOP_SIGNALS, StopSignal, stopped_by
from dpo_lab.runs import run_record
from dpo_lab.runs.redact import redact_command
from dpo_lab.sweeps.job_status import JobStatusStore, first_line, tail, whereabouts

LOG = "output.log"  # in a cell's folder: what it said on the terminal
COLOURING = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # ask for a terminal's colours: the log is a file
GRACE = 120.0  # seconds that a cell has to save and leave
TICK = 0.2  # seconds between two looks at a cell and at the wish to stop


class JobFailed(RuntimeError):
    """A cell ended without a committed result."""


def run_job(module: str, settings: RunConfig, is_done: Callable[[], bool] | None) -> None:
    """Run the current Hydra job of the door `module` in a child process and wait for it; nothing where it is done already.

    is_done: whether the cell's result lies in its folder. Raises JobFailed if it does not in the end, whatever the exit
    code. None: a run that keeps no record, whose exit code tells. Its output goes to LOG in its folder.
    """
    hydra = HydraConfig.get()
    folder, desk = Path(hydra.runtime.output_dir), _desk()
    if is_done is not None and is_done():
        return
    raise_if_stopping(desk)
    if multiprocessing.parent_process() is not None:  # a worker: its sweep tells it to stop, no signal does
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda *_: None)  # not SIG_IGN, which the cell's process would inherit
        set_parent_death_signal(signal.SIGKILL)
    before, began, log = run_record.read_record(folder), time.monotonic(), folder / LOG
    note = {"log": str(log), **whereabouts()}
    desk.note(folder, status="running", **note)
    status, error = "failed", "the process that waited for it was killed"
    try:
        with _share(settings.threads, settings.trainer) as variables, log.open("ab") as output:
            raise_if_stopping(desk)  # it may have waited long for its share
            code = _wait(_start(module, variables, output), desk)
        status, error = _ending(folder, before, code, is_done)
    except StopSignal as stopped:
        status, error = stopped.status, f"stopped by {stopped}"
        raise
    except Exception as failure:
        error = first_line(failure)
        raise
    finally:
        desk.note(folder, status=status, error=error, seconds=time.monotonic() - began, **note)
    if status != "done":
        raise JobFailed(f"{folder}: {error}; see {os.path.relpath(log)}")


def is_task() -> bool:
    """Whether this process is a scheduler's task, that runs a cell in place: as one of its ranks, heeding its signals."""
    return "submitit" in HydraConfig.get().launcher._target_


@contextmanager
def run_in_submitit_task(is_done: Callable[[], bool]) -> Iterator[None]:
    """Run a cell in this process, a task of a scheduler's, who starts it anew when it is put back into the queue.

    What would end a process of its own becomes JobFailed; the exit by which the job asks for its return to the queue
    passes through.
    """
    folder, desk, began = Path(HydraConfig.get().runtime.output_dir), _desk(), time.monotonic()
    raise_if_stopping(desk)
    notes = desk.note if _rank() == 0 else _say_nothing
    job = import_module("submitit").JobEnvironment()
    note = {"log": str(job.paths.stderr), **whereabouts()}
    notes(folder, status="running", **note)
    before = run_record.read_record(folder)
    status, error, over = "requeued", None, threading.Event()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_pass_on, args=(desk, over), daemon=True).start()
    try:
        yield
        status, error = ("done", None) if _rank() or is_done() else ("failed", "ended without a result")
    except (StopSignal, KeyboardInterrupt) as stopped:
        status = stopped.status if isinstance(stopped, StopSignal) else "interrupted"
        error = f"stopped by {first_line(stopped) or 'SIGINT'}"
    except SystemExit as end:
        if end.code not in (1, 2, 130, 142, 143):
            raise  # back into the queue
        status, error = _ending(folder, before, end.code, is_done)
    except Exception as failure:
        status, error = "failed", f"{type(failure).__name__}: {first_line(failure)}"
    finally:
        over.set()
        notes(folder, status=status, error=error, seconds=time.monotonic() - began, **note)
    if status != "done":
        raise JobFailed(f"{folder}: {error}")


def objective_value(objective: str | None) -> float | None:
    """What a sweeper that looks for the best run is told of the current job: the value of the metric `objective`."""
    if objective is None:
        return None
    folder = Path(HydraConfig.get().runtime.output_dir)
    metrics = (run_record.read_record(folder) or {}).get("metrics", {})
    if objective not in metrics:
        raise JobFailed(f"objective={objective}: {folder} measured no such thing; type one of {', '.join(metrics)}")
    return float(metrics[objective]["value"])


def command(module: str, hydra: HydraConf | DictConfig) -> list[str]:
    """The command line of one cell: what the sweep was given but the sweeping."""
    searched = [
        arg for s in hydra.runtime.config_sources if s.provider == "command-line" for arg in ("--config-dir", s.path)
    ]
    return [
        *(sys.executable, "-m", module, *searched, "--config-name", str(hydra.job.config_name)),
        *raw_overrides(hydra.overrides.task),
        *raw_overrides(hydra.overrides.hydra),
        "hydra.mode=RUN",
        f"hydra.run.dir='{os.path.relpath(hydra.runtime.output_dir, hydra.runtime.cwd)}'",
    ]


def raw_overrides(overrides: Any) -> list[str]:
    """Overrides as they were typed, what they interpolate unresolved."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def max_parallel_jobs(launcher: Mapping[str, Any]) -> int:
    """How many cells the chosen launcher runs at a time on this machine."""
    jobs = launcher.get("n_jobs") or 1
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def _desk() -> JobStatusStore:
    hydra = HydraConfig.get()
    return JobStatusStore(Path(hydra.runtime.cwd) / hydra.sweep.dir)


def _asked_to_stop(desk: JobStatusStore) -> int | None:
    """The signal that the sweep was asked to stop with; another sweeper than ours asks its cells in no such way."""
    return desk.asked_to_stop() if HydraConfig.get().sweeper._target_.startswith("hydra_plugins.dpo_lab.") else None


def raise_if_stopping(desk: JobStatusStore) -> None:
    if _asked_to_stop(desk) is not None:
        raise JobFailed(f"{HydraConfig.get().runtime.output_dir}: not started, the sweep was asked to stop")


def _start(module: str, variables: Mapping[str, str], output: Any) -> subprocess.Popen:
    hydra = HydraConfig.get()
    line = command(module, hydra)
    output.write(f"=== {datetime.now().isoformat(' ', 'seconds')} {redact_command(line)}\n".encode())
    output.flush()
    clean = {k: v for k, v in os.environ.items() if k not in (*DDP_VARIABLES, *COLOURING)}
    environment = {**clean, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1", **variables}
    return subprocess.Popen(
        line,
        env=environment,
        cwd=hydra.runtime.cwd,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def _wait(child: subprocess.Popen, desk: JobStatusStore) -> int:
    """The exit code of a cell, which is told once when the sweep is to stop; nothing of it is left behind."""
    deadline = None
    try:
        while True:
            try:
                return child.wait(TICK)
            except subprocess.TimeoutExpired:
                if deadline is None and (signum := _asked_to_stop(desk)) is not None:
                    child.send_signal(signum)
                    deadline = time.monotonic() + GRACE
                elif deadline is not None and time.monotonic() > deadline:
                    child.kill()
    except BaseException as error:
        stop(child, error.signum if isinstance(error, StopSignal) else signal.SIGINT, GRACE)
        raise
    finally:
        stop(child, signal.SIGKILL, 0)


def _ending(
    folder: Path, before: dict[str, Any] | None, code: int, is_done: Callable[[], bool] | None
) -> tuple[str, str | None]:
    """A cell's status and the first line of its true error. Its committed record decides, then how its process ended."""
    if code == 0 if is_done is None else is_done():
        return "done", None
    record = run_record.read_record(folder)
    if record is not None and record != before and record["status"] not in ("running", "done"):
        return record["status"], first_line(record.get("error"))
    if stopped := stopped_by(code):  # before it had anything to record
        return stopped.status, f"stopped by {stopped}"
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return "failed", "ended without a result"
    said = [line for line in tail(folder / LOG) if line.startswith(("error: ", "=== "))]
    if said and said[-1].startswith("error: "):
        return "failed", said[-1].removeprefix("error: ")
    return "failed", f"ended with exit code {code}"


@contextmanager
def _share(threads: int | None, trainer: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The variables that give a cell its part of the machine, where several run at once: GPUs of its own, CPU threads."""
    cells, on_gpu = max_parallel_jobs(HydraConfig.get().launcher), trainer.get("accelerator") != "cpu"
    if cells == 1 or not (on_gpu or threads is None):
        yield {}
        return
    with acquire_gpus(int(trainer["devices"])) if on_gpu else nullcontext() as gpus:
        variables = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        yield variables | ({"OMP_NUM_THREADS": str(threads_per_job(cells))} if threads is None else {})


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID") or os.environ.get("SUBMITIT_LOCAL_GLOBALID") or 0)


def _say_nothing(folder: Path, **entries: Any) -> None:
    """The other ranks of a cell leave the note to the first."""


def _pass_on(desk: JobStatusStore, over: threading.Event) -> None:
    """Send this process the SIGINT that the sweep was asked to stop with: SIGTERM means something else to a scheduler."""
    while not over.wait(5 * TICK):
        if _asked_to_stop(desk) is not None:
            os.kill(os.getpid(), signal.SIGINT)
            return
