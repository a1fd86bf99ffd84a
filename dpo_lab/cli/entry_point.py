"""What all commands share: the main wrapper, config errors in one line, exit codes, and the start of ranks."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab.config import schema
from dpo_lab.config.allowed_targets import TargetRefused, only_plugins
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.distributed import launcher
from dpo_lab.distributed.signals import StopSignal, end_on_signals, raise_on_signals, reraise_stop, stopped_by
from dpo_lab.distributed.supervisor import report_error, report_stop
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import explain_disk_error
from dpo_lab.runs.redact import redact_text, redact_yaml
from dpo_lab.sweeps import job, sweeper
from dpo_lab.sweeps.plan import AsRecord
from dpo_lab.training.loggers import tensorboard_hparams


def run_command(door: Callable[[], None], as_record: AsRecord = schema.as_record) -> int:
    """Call a Hydra main. Exit code: 0 done, 1 failed, 2 refused before anything was done, 130 interrupted, 142 stopped by
    trainer.max_time, 143 preempted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print: we print it, in one line
    sys.excepthook = _print_traceback
    try:
        raise_on_signals(report_stop)
        with only_plugins(), reraise_stop(), _redacted() if _shows_config() else nullcontext():
            sweeper.register(as_record)
            door()
    except schema.ConfigErrors as error:
        return print_error(schema.explain(error), 2)
    except (schema.ConfigError, run_record.RunRefused, TargetRefused) as error:
        return print_error(str(error), 2)
    except job.JobFailed as error:
        return print_error(str(error), 1)
    except StopSignal as stopped:
        return stopped.exit_code
    except OSError as error:
        if (line := explain_disk_error(error)) is None:
            raise
        return print_error(line, 1)
    finally:
        end_on_signals()
    return 0


def validate_and_run(cfg: DictConfig, body: Callable[[schema.RunConfig], None]) -> float | None:
    """Validate `cfg`, then body(settings). What the user can mend ends the process with one line and exit code 2.

    It ends by SystemExit, since Hydra reports every other exception a second time, with all that was typed. A cell of a sweep
    gives its objective.
    """
    is_cell = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        with reraise_stop():
            settings = schema.validate(cfg)
            body(settings)
        return job.objective_value(settings.objective) if is_cell else None
    except (schema.ConfigError, run_record.RunRefused, BadData, NoTemplate) as error:
        if is_cell:
            raise job.JobFailed(str(error)) from None
        report_error(redact_text(str(error)), 2)
        sys.exit(print_error(str(error), 2))
    except run_record.RunFailed as error:
        if is_cell:
            raise job.JobFailed(str(error)) from None
        report_error(redact_text(f"{type(error).__name__}: {error}"), 1)
        sys.exit(print_error(str(error), 1))
    except StopSignal as stopped:
        report_stop(stopped)  # between two steps no signal handler did
        raise
    except Exception as error:
        line = explain_disk_error(error)
        report_error(redact_text(line or f"{type(error).__name__}: {error}"), 1)
        if is_cell and line:
            raise job.JobFailed(line) from None
        if is_cell:
            raise
        if line is None:
            _print_traceback(type(error), error, error.__traceback__)
            sys.exit(1)
        sys.exit(print_error(line, 1))


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import inside it what a run needs: that takes a third less time, and what is collected later takes less, too.

    Imports make a million objects that live as long as the process. The garbage collector would search them again and
    again while they grow, and in every full collection after that; here it waits, and then leaves them out for good.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_or_spawn_ranks(
    module: str,
    settings: schema.RunConfig,
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
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    run_record.refuse_outside(folder)
    is_done = lambda: run_record.run_status(folder, record, schema.input_files(settings)) is run_record.RunStatus.done  # noqa: E731
    if HydraConfig.get().mode is RunMode.MULTIRUN and not job.is_task():
        job.run_job(module, settings, None if alone else is_done)
        return
    with job.run_in_submitit_task(is_done) if HydraConfig.get().mode is RunMode.MULTIRUN else nullcontext():
        _run_here(module, settings, folder, is_done, run=run, again=again, alone=alone)


def _run_here(
    module: str,
    settings: schema.RunConfig,
    folder: Path,
    is_done: Callable[[], bool],
    *,
    run: Callable[[Path], None],
    again: Callable[[Mapping[str, Any], Path], None],
    alone: bool,
) -> None:
    """One run in this process: as a rank, or with as many ranks as it takes."""
    if launcher.is_rank():
        if parent := os.environ.get(launcher.PARENT):
            launcher.set_parent_death_signal(signal.SIGKILL, int(parent))
        run(folder)
        return
    if parent := os.environ.get(launcher.PARENT):
        launcher.set_parent_death_signal(
            signal.SIGTERM, int(parent)
        )  # a cell of a sweep: it puts its work in safety first
    print(f"dpo_lab: {folder}", flush=True)  # before the seconds that torch takes to load
    if is_done():
        done = run_record.read_record(folder)
        assert done is not None
        again(done, folder)
        return
    trainer = settings.trainer
    try:
        ranks = (
            1
            if alone
            else launcher.num_local_ranks(str(trainer["accelerator"]), trainer["devices"], int(trainer["num_nodes"]))
        )
    except ValueError as error:
        raise schema.ConfigError(str(error)) from None
    if ranks == 1:
        run(folder)
    else:
        _run_ranks(module, folder, ranks, int(trainer["num_nodes"]))


def _run_ranks(module: str, folder: Path, ranks: int, nodes: int) -> None:
    """Start the ranks and see to it that they end together; end as they did."""
    cwd = Path(HydraConfig.get().runtime.cwd)
    try:
        ended = launcher.run_ranks(job.command(module, HydraConfig.get()), ranks, folder=folder, cwd=cwd, nodes=nodes)
    except StopSignal as stopped:
        run_record.mark_ended(folder, stopped.status, f"stopped by {stopped}")
        raise
    except ValueError as error:
        raise schema.ConfigError(str(error)) from None
    if ended.code == 0:
        return
    if ended.code != 2:  # refused: nothing was begun
        stopped = stopped_by(ended.code)
        run_record.mark_ended(folder, stopped.status if stopped else "failed", str(ended.error))
        if (run_record.read_record(folder) or {}).get("status") == "failed":
            tensorboard_hparams.end(folder, succeeded=False)
    sys.exit(ended.code)


def _shows_config() -> bool:
    """Whether Hydra is asked to print what it composed."""
    asked, _ = get_args_parser().parse_known_args()
    return bool(asked.cfg or asked.info)


@contextmanager
def _redacted() -> Iterator[None]:
    """What is printed inside it, a config in YAML, comes out without secrets."""
    held = io.StringIO()
    try:
        with redirect_stdout(held):
            yield
    finally:
        print(redact_yaml(held.getvalue()), end="")


def print_error(message: str, code: int) -> int:
    print(f"error: {redact_text(message)}", file=sys.stderr)
    return code


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """The traceback of what nobody expected, without secrets."""
    print(redact_text("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)
