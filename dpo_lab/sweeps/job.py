"""One job of a sweep as a process of its own: the same command with the job's overrides, and how it ended.

Lightning's DDP starts its ranks by repeating the command line, which under --multirun would repeat the whole sweep; the
command line of a job's own process holds one run only. Under SLURM a job's ranks are the tasks of a SLURM job, so there
it runs in the task's process.
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
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_lab import plugins
from dpo_lab.config.schema import RunConfig
from dpo_lab.distributed.fork_server import Fork, ForkServer
from dpo_lab.distributed.launcher import DDP_VARIABLES, PARENT, set_parent_death_signal, stop
from dpo_lab.distributed.resource_locks import acquire_gpus, threads_per_job
from dpo_lab.distributed.signals import STOP_SIGNALS, StopSignal, stopped_by
from dpo_lab.errors import first_line
from dpo_lab.runs import run_record
from dpo_lab.runs.redact import redact_command
from dpo_lab.sweeps.job_status import LOG, MARK, SweepFolder, open_log, tail, write_line
from dpo_lab.sweeps.plan import raw_overrides

# Force the colours of a terminal, which a log file must not have.
COLOURING = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
GRACE = 120.0  # seconds for a job to save and exit
TICK = 0.2  # seconds between two checks of a job and of the request to stop

_server: ForkServer | None = None  # that started this process's last job


class JobFailed(RuntimeError):
    """A job ended without a recorded result."""


def run_job(module: str, settings: RunConfig, is_done: Callable[[], bool] | None, imported: str | None = None) -> None:
    """Run the current Hydra job of the command `module` in a child process and wait for it, unless it is done already.

    is_done: whether the job's folder holds its result; None for a run without a record, whose exit code decides. Its
    output goes to LOG in its folder. imported: a module that the command imports and that takes seconds, which a job on a
    CPU gets from a fork server. Raises JobFailed if the job has no result in the end, whatever its exit code.
    """
    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), _sweep_folder()
    if is_done is not None and is_done():
        return
    raise_if_stopping(sweep)
    # A worker process: the sweep asks it to stop by a file, not by a signal.
    if multiprocessing.parent_process() is not None:
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda *_: None)  # not SIG_IGN, which the job's process would inherit
        set_parent_death_signal(signal.SIGKILL)
    before, on_gpu = run_record.read_record(folder), settings.trainer.get("accelerator") != "cpu"
    with open_log(folder) as log:
        status, error = "failed", "the process that waited for it was killed"
        try:
            with _share_of_machine(settings.threads, on_gpu, settings.trainer) as variables:
                raise_if_stopping(sweep)  # it may have waited long for free GPUs
                code = _wait(_start(module, None if on_gpu else imported, variables, log), sweep)
            status, error = _ending(folder, before, code, is_done)
            if status == "failed" and code < 0 and (asked := _stop_signal(sweep)) is not None:
                status = StopSignal(asked).status  # it was killed because it did not end in time
        except StopSignal as stopped:
            status, error = stopped.status, f"stopped by {stopped}"
            raise
        except Exception as failure:
            error = first_line(failure)
            if (asked := _stop_signal(sweep)) is not None:  # so that it was not started
                status = StopSignal(asked).status
            raise
        finally:
            write_line(log, f"{status}: {error}" if error else status)
    if status != "done":
        raise JobFailed(f"{folder}: {error}; see {os.path.relpath(folder / LOG)}")


def is_task() -> bool:
    """Return whether this process is a scheduler's task, which runs a job itself, as one of its ranks."""
    return "submitit" in HydraConfig.get().launcher._target_


@contextmanager
def run_in_submitit_task(is_done: Callable[[], bool]) -> Iterator[None]:
    """Run a job in this process, a scheduler's task; the scheduler starts it again after a requeue.

    Exceptions and exits that would end a process of its own become JobFailed, except the exit after a requeue.
    """
    folder, sweep = Path(HydraConfig.get().runtime.output_dir), _sweep_folder()
    raise_if_stopping(sweep)
    before, over = run_record.read_record(folder), threading.Event()
    status, error = "requeued", None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_forward_stop, args=(sweep, over), daemon=True).start()
    with open_log(folder) if _rank() == 0 else nullcontext() as log:
        if log is not None:
            output = os.path.relpath(import_module("submitit").JobEnvironment().paths.stderr)
            write_line(log, f"{run_record.now()} a scheduler's task, whose output is in {output}")
        try:
            yield
            status, error = ("done", None) if _rank() or is_done() else ("failed", "ended without a result")
        except SystemExit as end:
            if end.code not in (1, 2, 130, 142, 143):
                raise  # requeued
            status, error = _ending(folder, before, end.code, is_done)
        except BaseException as failure:
            status, error = run_record.ending(failure)
        finally:
            over.set()
            if log is not None:
                write_line(log, f"{status}: {error}" if error else status)
    if status != "done":
        raise JobFailed(f"{folder}: {error}")


def optimized_value(metric: str | None) -> float | None:
    """Return the current job's value of a metric, for a sweeper that optimizes it; None without one."""
    if metric is None:
        return None
    folder = Path(HydraConfig.get().runtime.output_dir)
    metrics = (run_record.read_record(folder) or {}).get("metrics", {})
    if metric not in metrics:
        raise JobFailed(f"optimized_metric={metric}: {folder} has no such metric; type one of {', '.join(metrics)}")
    return float(metrics[metric]["value"])


def command(module: str, hydra: HydraConf | DictConfig) -> list[str]:
    """Return the command line of one job: the sweep's command line without --multirun, with the job's overrides."""
    searched = [
        arg for s in hydra.runtime.config_sources if s.provider == "command-line" for arg in ("--config-dir", s.path)
    ]
    return [
        *(sys.executable, "-m", module, *searched, "--config-name", str(hydra.job.config_name), *plugins.words()),
        *raw_overrides(hydra.overrides.task),
        *(each for each in raw_overrides(hydra.overrides.hydra) if not each.startswith("hydra.sweep.")),
        "hydra.mode=RUN",
        f"hydra.run.dir='{os.path.relpath(hydra.runtime.output_dir, hydra.runtime.cwd)}'",
    ]


def max_parallel_jobs(launcher: Mapping[str, Any]) -> int:
    """Return how many jobs a launcher runs in parallel on this machine."""
    jobs = launcher.get("n_jobs") or 1
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def _sweep_folder() -> SweepFolder:
    hydra = HydraConfig.get()
    return SweepFolder(Path(hydra.runtime.cwd) / hydra.sweep.dir)


def _stop_signal(sweep: SweepFolder) -> int | None:
    """Return the signal with which the sweep was asked to stop; None under a sweeper that is not this package's."""
    return sweep.stop_signal() if HydraConfig.get().sweeper._target_.startswith("hydra_plugins.dpo_lab.") else None


def raise_if_stopping(sweep: SweepFolder) -> None:
    """Raise JobFailed if the sweep was asked to stop."""
    if _stop_signal(sweep) is not None:
        raise JobFailed(f"{HydraConfig.get().runtime.output_dir}: not started, the sweep was asked to stop")


def _start(module: str, imported: str | None, variables: Mapping[str, str], output: Any) -> subprocess.Popen | Fork:
    """Start a job's process, of a fork server if `imported` is not None."""
    hydra = HydraConfig.get()
    line = command(module, hydra)
    write_line(output, f"{run_record.now()} {redact_command(line)}")
    clean = {k: v for k, v in os.environ.items() if k not in (*DDP_VARIABLES, *COLOURING)}
    environment = {**clean, "PYTHONUNBUFFERED": "1", **variables}
    if imported is not None and sys.platform == "linux":
        server = _fork_server(imported, environment, hydra.runtime.cwd)
        with suppress(ConnectionError):  # where it has ended, a process of its own shows the error of its imports
            return server.start(line[2:], output)
    return subprocess.Popen(
        line,
        env=environment | {PARENT: str(os.getpid())},
        cwd=hydra.runtime.cwd,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def _fork_server(imported: str, environment: Mapping[str, str], cwd: str) -> ForkServer:
    """Return the fork server of the last job if its processes have this environment, else a new one."""
    global _server
    if _server is None or not _server.serves(imported, environment, cwd):
        if _server is not None:
            _server.close()
        _server = ForkServer(imported, environment, cwd)
    return _server


def _wait(child: subprocess.Popen | Fork, sweep: SweepFolder) -> int:
    """Wait for a job's process and return its exit code; forward a request to stop once; leave no process behind."""
    deadline = None
    try:
        while True:
            try:
                return child.wait(TICK)
            except subprocess.TimeoutExpired:
                if deadline is None and (signum := _stop_signal(sweep)) is not None:
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
    """Return a job's status and the first line of its error, from its record, else from its exit code and its log."""
    if code == 0 if is_done is None else is_done():
        return "done", None
    record = run_record.read_record(folder)
    if record is not None and record != before and record["status"] not in ("running", "done"):
        return record["status"], record.get("error")
    if stopped := stopped_by(code):  # before it wrote a record
        return stopped.status, f"stopped by {stopped}"
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return "failed", "ended without a result"
    lines = [line for line in tail(folder / LOG) if line.startswith(("error: ", MARK))]
    if lines and lines[-1].startswith("error: "):
        return "failed", lines[-1].removeprefix("error: ")
    return "failed", f"ended with exit code {code}"


@contextmanager
def _share_of_machine(threads: int | None, on_gpu: bool, trainer: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a job's share of the machine, GPUs and CPU threads, if several run."""
    jobs = max_parallel_jobs(HydraConfig.get().launcher)
    if jobs == 1 or not (on_gpu or threads is None):
        yield {}
        return
    with acquire_gpus(int(trainer["devices"])) if on_gpu else nullcontext() as gpus:
        variables = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        yield variables | ({"OMP_NUM_THREADS": str(threads_per_job(jobs))} if threads is None else {})


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID") or os.environ.get("SUBMITIT_LOCAL_GLOBALID") or 0)


def _forward_stop(sweep: SweepFolder, over: threading.Event) -> None:
    """Send this process SIGINT when the sweep is asked to stop; SIGTERM has another meaning to a scheduler."""
    while not over.wait(5 * TICK):
        if _stop_signal(sweep) is not None:
            os.kill(os.getpid(), signal.SIGINT)
            return
