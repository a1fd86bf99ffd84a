"""The commands as functions: train, fine-tune, make a reward model, evaluate, sweep and study, as on the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_lab.api.overrides import Overrides, composed, without_plugins
from dpo_lab.api.run import Run, load_run
from dpo_lab.api.runs import Runs, load_runs, runs_of_sweep
from dpo_lab.cli.entry_point import num_local_ranks
from dpo_lab.config import schema
from dpo_lab.config.from_run import EvaluateConfig
from dpo_lab.distributed.signals import STOP_SIGNALS, StopSignal, reraise_stop
from dpo_lab.errors import LabError
from dpo_lab.pipelines.commands import REWARD, SFT, TRAIN, Command
from dpo_lab.runs.atomic_write import explain_disk_error
from dpo_lab.study import planned_studies


def train(overrides: Overrides = ()) -> Run:
    """Train a policy by DPO or another method and evaluate it, as `python -m dpo_lab.train` does, and return the run.

    overrides: as typed on the command line, `["beta=0.3", "seed=1"]`, or as a mapping, `{"beta": 0.3, "seed": 1}`. A run
    that is finished in its folder is returned at once; one that was interrupted is resumed. It trains in this process, and
    over several devices in processes that it starts. It seeds the random generators of this process.

    Raises LabError, with the line that the command prints, and KeyboardInterrupt after the step in progress was saved.
    """
    return _run(TRAIN, overrides)


def sft(overrides: Overrides = ()) -> Run:
    """Fine-tune a policy on rows of your own, as `python -m dpo_lab.sft` does, and return the run; see `train`."""
    return _run(SFT, overrides)


def reward(overrides: Overrides = ()) -> Run:
    """Train a reward model, as `python -m dpo_lab.reward` does, and return the run; see `train`."""
    return _run(REWARD, overrides)


def evaluate(overrides: Overrides) -> Run:
    """Evaluate a policy that another trainer made, as `python -m dpo_lab.evaluate trained=FOLDER ...` does, and return the
    record of the evaluation as a run; see `train`. With `run=FOLDER` a finished run is evaluated again, and the run is
    returned whose folder `evaluations` holds the result.
    """
    from dpo_lab.pipelines.evaluate_run import run_evaluation

    words = without_plugins(overrides)
    with _as_a_call(), composed("evaluate", words) as (cfg, _):
        settings = schema.validate(cfg)
        assert isinstance(settings, EvaluateConfig)
        run_evaluation(cfg, settings)
        return load_run(settings.folder)


def sweep(overrides: Overrides) -> Runs:
    """Run every combination of the swept values, as `python -m dpo_lab.train --multirun` does, and return its runs.

    overrides: as typed, `["beta=0.03,0.3", "seed=0,1,2"]`, or a mapping whose lists are swept, `{"beta": [0.03, 0.3],
    "seed": [0, 1, 2]}`. Each run is a process of its own; `launcher=joblib hydra.launcher.n_jobs=2` runs two at a time.
    Finished runs are not run again.

    Raises LabError if a combination is invalid, before any of them runs, or if one is not done at the end; `load_runs`
    returns the others then.
    """
    words = without_plugins(overrides, swept=True)
    parsed = OverridesParser.create().parse_overrides(words)
    shared = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
    with composed(TRAIN.config_name, shared) as (_, folder):
        place = folder.parent.parent  # <name>/<overrides>/seed=N
    _run_command(TRAIN.module, "--multirun", *words)
    return runs_of_sweep(place)


def study(file: str | Path, budget: str = "full", overrides: Overrides = ()) -> Runs:
    """Run a study, every arm under every seed of a budget, as `python -m dpo_lab.study FILE budget=...` does, and return
    its runs, whose `verdicts()` say what became of its predictions; see `sweep`. overrides: also `until=decided` and
    `max_seeds=24`.
    """
    words = [str(file), f"budget={budget}", *without_plugins(overrides)]
    (planned,), _, _ = planned_studies(words, words)
    _run_command("dpo_lab.study", *words)
    return load_runs(planned.folder)


def _run(command: Command, overrides: Overrides) -> Run:
    """Run a command that trains in this process, or over several devices as a process of its own."""
    words = without_plugins(overrides)
    with _as_a_call(), composed(command.config_name, words) as (cfg, folder):
        settings = schema.validate(cfg)
        if command.makes_no_record(settings):
            raise LabError(
                "sft: the embedded policy is made when a run needs it, and has no run of its own; type"
                " train(...).initial_policy(), or give data.path= of your rows"
            )
        if not command.is_done(cfg, settings, folder):
            if num_local_ranks(settings.trainer) > 1:
                _run_command(command.module, *words)
            else:
                command.load()(cfg, settings, folder)
        return load_run(folder)


@contextmanager
def _as_a_call() -> Iterator[None]:
    """Raise what ends a command as an exception of Python's, and restore the process's signal handlers."""
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        with reraise_stop():
            yield
    except StopSignal as stopped:
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt("stopped after a step; the same call resumes the run") from None
        raise LabError(f"stopped by {stopped}; the same call resumes the run") from None
    except OSError as error:
        if (line := explain_disk_error(error)) is None:
            raise
        raise LabError(line) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def _run_command(module: str, *arguments: str) -> None:
    """Run `python -m MODULE`, print what it prints, and raise LabError with its error in one line if it fails.

    At KeyboardInterrupt it is asked to stop and waited for.
    """
    line = [sys.executable, "-u", "-m", module, *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(line, text=True, start_new_session=True, **pipes) as child:  # type: ignore[call-overload]
        errors: list[str] = []
        while True:
            try:
                for output in child.stdout or ():
                    print(output, end="", flush=True)
                    errors += [output.removeprefix("error: ").strip()] if output.startswith("error: ") else []
                break
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
    if child.returncode == 128 + signal.SIGINT:
        raise KeyboardInterrupt("stopped; the same call runs the rest")
    if child.returncode:
        raise LabError(errors[-1] if errors else f"{module}: not everything is done; the same call runs the rest")
