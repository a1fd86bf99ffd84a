"""What all doors share: a config error in one line, exit codes that tell, where a run lies, and its ranks."""

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

from dpo_lab import config, launch
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.results import hparams, runs
from dpo_lab.results.files import trouble_of_disk
from dpo_lab.results.secrets import redact_text, redact_yaml
from dpo_lab.stop import Stopped, end_on_signals, raise_on_signals, stop_is_the_cause, stopped_by
from dpo_lab.supervisor import tell_of_stop, tell_supervisor
from dpo_lab.sweep import cell, sweeper
from dpo_lab.sweep.plan import AsRecord
from dpo_lab.targets import TargetRefused, only_plugins


def open_door(door: Callable[[], None], as_record: AsRecord = config.as_record) -> int:
    """Call a Hydra main. Exit code: 0 done, 1 failed, 2 refused before anything was done, 130 interrupted, 142 stopped by
    trainer.max_time, 143 preempted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print: we print it, in one line
    sys.excepthook = _show
    try:
        raise_on_signals(tell_of_stop)
        with only_plugins(), stop_is_the_cause(), _redacted() if _shows_config() else nullcontext():
            sweeper.register(as_record)
            door()
    except config.ConfigErrors as error:
        return _complain(config.explain(error), 2)
    except (config.ConfigError, runs.RunRefused, TargetRefused) as error:
        return _complain(str(error), 2)
    except cell.CellFailed as error:
        return _complain(str(error), 1)
    except Stopped as stopped:
        return stopped.exit_code
    except OSError as error:
        if (line := trouble_of_disk(error)) is None:
            raise
        return _complain(line, 1)
    finally:
        end_on_signals()
    return 0


def settle(cfg: DictConfig, body: Callable[[config.RunConfig], None]) -> float | None:
    """Validate `cfg`, then body(settings). What the user can mend ends the process with one line and exit code 2.

    It ends by SystemExit, since Hydra reports every other exception a second time, with all that was typed. A cell of a sweep
    gives its objective.
    """
    is_cell = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        with stop_is_the_cause():
            settings = config.validate(cfg)
            body(settings)
        return cell.value(settings.objective) if is_cell else None
    except (config.ConfigError, runs.RunRefused, BadData, NoTemplate) as error:
        if is_cell:
            raise cell.CellFailed(str(error)) from None
        tell_supervisor(redact_text(str(error)), 2)
        sys.exit(_complain(str(error), 2))
    except runs.RunFailed as error:
        if is_cell:
            raise cell.CellFailed(str(error)) from None
        tell_supervisor(redact_text(f"{type(error).__name__}: {error}"), 1)
        sys.exit(_complain(str(error), 1))
    except Stopped as stopped:
        tell_of_stop(stopped)  # between two steps no signal handler did
        raise
    except Exception as error:
        line = trouble_of_disk(error)
        tell_supervisor(redact_text(line or f"{type(error).__name__}: {error}"), 1)
        if is_cell and line:
            raise cell.CellFailed(line) from None
        if is_cell:
            raise
        if line is None:
            _show(type(error), error, error.__traceback__)
            sys.exit(1)
        sys.exit(_complain(line, 1))


@contextmanager
def loading() -> Iterator[None]:
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
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    runs.refuse_outside(folder)
    is_done = lambda: runs.standing(folder, record, config.input_files(settings)) is runs.Standing.done  # noqa: E731
    if HydraConfig.get().mode is RunMode.MULTIRUN and not cell.is_task():
        cell.run_cell(module, settings, None if alone else is_done)
        return
    with cell.in_place(is_done) if HydraConfig.get().mode is RunMode.MULTIRUN else nullcontext():
        _live(module, settings, folder, is_done, run=run, again=again, alone=alone)


def _live(
    module: str,
    settings: config.RunConfig,
    folder: Path,
    is_done: Callable[[], bool],
    *,
    run: Callable[[Path], None],
    again: Callable[[Mapping[str, Any], Path], None],
    alone: bool,
) -> None:
    """One run in this process: as a rank, or with as many ranks as it takes."""
    if launch.is_rank():
        if parent := os.environ.get(launch.PARENT):
            launch.die_with_parent(signal.SIGKILL, int(parent))
        run(folder)
        return
    if parent := os.environ.get(launch.PARENT):
        launch.die_with_parent(signal.SIGTERM, int(parent))  # a cell of a sweep: it puts its work in safety first
    print(f"dpo_lab: {folder}", flush=True)  # before the seconds that torch takes to load
    if is_done():
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


def _run_ranks(module: str, folder: Path, ranks: int, nodes: int) -> None:
    """Start the ranks and see to it that they end together; end as they did."""
    cwd = Path(HydraConfig.get().runtime.cwd)
    try:
        ended = launch.run_ranks(cell.command(module, HydraConfig.get()), ranks, folder=folder, cwd=cwd, nodes=nodes)
    except Stopped as stopped:
        runs.close(folder, stopped.status, f"stopped by {stopped}")
        raise
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    if ended.code == 0:
        return
    if ended.code != 2:  # refused: nothing was begun
        stopped = stopped_by(ended.code)
        runs.close(folder, stopped.status if stopped else "failed", str(ended.error))
        if (runs.read_record(folder) or {}).get("status") == "failed":
            hparams.end(folder, succeeded=False)
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


def _complain(message: str, code: int) -> int:
    print(f"error: {redact_text(message)}", file=sys.stderr)
    return code


def _show(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """The traceback of what nobody expected, without secrets."""
    print(redact_text("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)
