"""What all commands share: the main wrapper, config errors in one line, exit codes, and the start of ranks."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab import plugins
from dpo_lab.config import from_run, schema
from dpo_lab.config.allowed_targets import OURS, check_hydra, target_of
from dpo_lab.distributed import launcher
from dpo_lab.distributed.signals import StopSignal, end_on_signals, raise_on_signals, reraise_stop, stopped_by
from dpo_lab.distributed.supervisor import report_error, report_stop
from dpo_lab.errors import LabError
from dpo_lab.evals import evaluate
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import explain_disk_error
from dpo_lab.runs.redact import redact_text, redact_yaml
from dpo_lab.sweeps import job, sweeper
from dpo_lab.sweeps.plan import AsRecord
from dpo_lab.terminal.pipes import explain_closed, quiet_if_closed
from dpo_lab.training.loggers import tensorboard_hparams


@quiet_if_closed()
def run_command(hydra_main: Callable[[], None], as_record: AsRecord = schema.as_record) -> int:
    """Call a function decorated with `hydra.main`, print its error in one line, and return the exit code.

    0: done; 1: failed; 2: refused before anything was done; 130: interrupted; 142: stopped by trainer.max_time; 143:
    preempted. as_record: returns the config of a sweep's job as the run records it.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them: we print one line
    sys.excepthook = _print_traceback
    try:
        raise_on_signals(report_stop)
        with reraise_stop():
            sys.argv[1:] = load_plugins(sys.argv[1:])
            sweeper.register(as_record)
            options, _ = get_args_parser().parse_known_args()
            _check_hydra_settings(hydra_main, options)
            with _redacted() if options.cfg or options.info else nullcontext():
                hydra_main()
    except schema.ConfigErrors as error:
        return print_error(schema.explain(error), 2)
    except job.JobFailed as error:
        return print_error(str(error), 1)
    except LabError as error:
        return print_error(str(error), 2)
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
    """Validate `cfg` and call body(settings); end the process with one line and exit code 2 on errors the user can fix.

    The process ends by SystemExit, since Hydra would report any other exception a second time, with the whole command
    line. A job of a sweep raises JobFailed instead, and returns the value of the metric `optimized_metric`, if one is set.
    """
    is_sweep_job = _is_sweep_job()
    try:
        with reraise_stop():
            if is_sweep_job:  # composed by a sweeper that may not be this package's
                check_hydra(HydraConfig.get())
            settings = schema.validate(cfg)
            schema.check_files(settings)
            body(settings)
        return job.optimized_value(settings.optimized_metric) if is_sweep_job else None
    except run_record.RunFailed as error:
        if is_sweep_job:
            raise job.JobFailed(str(error)) from None
        report_error(redact_text(f"{type(error).__name__}: {error}"), 1)
        sys.exit(print_error(str(error), 1))
    except LabError as error:
        if is_sweep_job:
            raise job.JobFailed(str(error)) from None
        report_error(redact_text(str(error)), 2)
        sys.exit(print_error(str(error), 2))
    except StopSignal as stopped:
        report_stop(stopped)  # a signal that is handled between two steps has not been reported yet
        raise
    except Exception as error:
        line = explain_disk_error(error) or explain_closed(error)
        report_error(redact_text(line or f"{type(error).__name__}: {error}"), 1)
        if is_sweep_job and line:
            raise job.JobFailed(line) from None
        if is_sweep_job:
            raise
        if line is None:
            _print_traceback(type(error), error, error.__traceback__)
            sys.exit(1)
        sys.exit(print_error(line, 1))


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """Import the plugins that a command line names, add their choices, and return the other words.

    A process that a run or a sweep started has them from its parent and imports no others, since overrides in its
    command line may come from a config. Raises PluginError.
    """
    is_new, others = plugins.load_typed(arguments, may_import=launcher.PARENT not in os.environ)
    if is_new:
        evaluate.define_settings()
        schema.register()
        from_run.register()
    return others


def _is_sweep_job() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def run_or_spawn_ranks(
    module: str,
    settings: schema.RunConfig,
    record: Mapping[str, Any],
    *,
    run: Callable[[Path], None],
    if_done: Callable[[Mapping[str, Any], Path], None],
    single_process: bool = False,
    imported: str | None = None,
) -> None:
    """Call run(folder) in this process, or start as many ranks of the command `module` as the trainer has devices here.

    record: the config as it is recorded. if_done(run record, folder): called instead if the run is done already.
    single_process: the run uses one process whatever the trainer's devices. Under --multirun the run is one job of a
    sweep, in a child process; imported: see job.run_job.
    """
    folder, is_sweep_job = Path(os.path.relpath(HydraConfig.get().runtime.output_dir)), _is_sweep_job()
    run_record.refuse_outside(folder)

    def is_done() -> bool:
        return run_record.run_status(folder, record, schema.input_files(settings)) is run_record.RunStatus.done

    if is_sweep_job and not job.is_task():
        job.run_job(module, settings, None if single_process else is_done, imported)
        return
    with job.run_in_submitit_task(is_done) if is_sweep_job else nullcontext():
        parent = int(os.environ.get(launcher.PARENT, 0))
        if launcher.is_rank():
            if parent:
                launcher.set_parent_death_signal(signal.SIGKILL, parent)
            run(folder)
            return
        if parent:
            launcher.set_parent_death_signal(signal.SIGTERM, parent)  # a job of a sweep: it saves before it ends
        print(f"dpo_lab: {folder}", flush=True)  # before torch is imported, which takes seconds
        if is_done():
            finished = run_record.read_record(folder)
            assert finished is not None
            if_done(finished, folder)
        elif single_process or (ranks := num_local_ranks(settings.trainer)) == 1:
            run(folder)
        else:
            _run_ranks(module, folder, ranks, int(settings.trainer["num_nodes"]))


def num_local_ranks(trainer: Mapping[str, Any]) -> int:
    """Return the number of ranks on this machine for the settings of the trainer. Raise ConfigError if they are invalid."""
    try:
        return launcher.num_local_ranks(str(trainer["accelerator"]), trainer["devices"], int(trainer["num_nodes"]))
    except ValueError as error:
        raise schema.ConfigError(str(error)) from None


def _run_ranks(module: str, folder: Path, ranks: int, nodes: int) -> None:
    """Start the ranks, wait until all have ended, and exit with their exit code unless it is 0."""
    cwd = Path(HydraConfig.get().runtime.cwd)
    try:
        status = launcher.run_ranks(job.command(module, HydraConfig.get()), ranks, folder=folder, cwd=cwd, nodes=nodes)
    except StopSignal as stopped:
        run_record.mark_ended(folder, stopped.status, f"stopped by {stopped}")
        raise
    except ValueError as error:
        raise schema.ConfigError(str(error)) from None
    if status.code == 0:
        return
    if status.code != 2:  # 2: refused, nothing was started
        stopped = stopped_by(status.code)
        run_record.mark_ended(folder, stopped.status if stopped else "failed", str(status.error))
        if (run_record.read_record(folder) or {}).get("status") == "failed":
            tensorboard_hparams.end(folder, succeeded=False)
    sys.exit(status.code)


def _check_hydra_settings(hydra_main: Callable[[], None], options: Namespace) -> None:
    """Raise TargetRefused if the `hydra` node of this command's config sets what it may not, see `check_hydra`.

    Hydra instantiates what that node names before it calls the decorated function. So the config is composed once
    before, by Hydra's own `--cfg`, which instantiates nothing. options: the parsed command line.
    """
    if options.shell_completion:
        return
    paths = ("config_path", "config_name", "config_dir")
    sources = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in paths if getattr(options, name)]
    parsed = OverridesParser.create().parse_overrides(options.overrides)
    single = [override.input_line for override in parsed if not override.is_sweep_override()]
    typed, sys.argv = sys.argv, [sys.argv[0], "--cfg=all", "--package=hydra.runtime.cwd", *sources, *single]
    try:
        with redirect_stdout(io.StringIO()):
            hydra_main()
    finally:
        sys.argv = typed
    if not HydraConfig.initialized():  # a function that Hydra does not call
        return
    hydra = HydraConfig.get()
    check_hydra(hydra)
    only_prints = options.help or options.hydra_help or options.cfg or options.info
    is_sweep = options.multirun or hydra.mode is RunMode.MULTIRUN
    if is_sweep and not only_prints and target_of(hydra.sweeper) not in OURS:
        # Other sweepers start jobs unchecked, and Hydra configures logging before a job's own check; without a root
        # logger it does not.
        sys.argv = [typed[0], "--multirun", *sources, *options.overrides, "++hydra.job_logging.root=null"]


@contextmanager
def _redacted() -> Iterator[None]:
    """Redact secrets in what is printed inside the context, a config in YAML."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        print(redact_yaml(printed.getvalue()), end="")


def print_error(message: str, code: int) -> int:
    """Print `message` to stderr without secrets, and return `code`."""
    print(f"error: {redact_text(message)}", file=sys.stderr)
    return code


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print the traceback of an unexpected error without secrets."""
    print(redact_text("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)
