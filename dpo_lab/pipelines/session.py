"""What every run shares: process set-up, run folder, Trainer, logging, stage timing, fit, and the final record."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config.allowed_targets import TargetRefused, instantiate_checked
from dpo_lab.config.precision import check_device_precision, warn_of_slow_bf16
from dpo_lab.config.schema import ConfigError, RunConfig, input_files
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.data.rows import BadData
from dpo_lab.distributed.collectives import all_gather_object
from dpo_lab.distributed.signals import StopRequest, reraise_stop
from dpo_lab.health.diagnose import print_health
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.pipelines.inputs import Forward, TrainingInputs
from dpo_lab.pipelines.loggers import add_loggers, last_line, log_final_metrics, track_run_status
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.reporting.figures import draw_run, remove_figures
from dpo_lab.reporting.model_card import model_card
from dpo_lab.reporting.run_summary import cost_rows, print_summary
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import explain_disk_error
from dpo_lab.runs.fingerprint import config_digest
from dpo_lab.runs.redact import Redacting
from dpo_lab.runs.run_record import RunFailed, RunRefused
from dpo_lab.stats.estimates import Estimate
from dpo_lab.terminal.progress import log_handler, plain_console
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.checkpointing import Checkpointing
from dpo_lab.training.callbacks.health import final_findings
from dpo_lab.training.callbacks.progress_bar import TimeLimit
from dpo_lab.training.callbacks.throughput import Throughput
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO, newest, remove_leftovers, step_of
from dpo_lab.training.torch_setup import set_up_device, setup_torch

log = logging.getLogger("dpo_lab")

REFUSALS = (ConfigError, RunRefused, BadData, NoTemplate)  # what the user can fix: the command prints it in one line
T = TypeVar("T")


@dataclass(frozen=True)
class Resume:
    """Where training resumes: the checkpoint (None: the start), and the number of steps if it had finished."""

    checkpoint: Path | None = None
    trained_to: int | None = None


def open_session(
    config: RunConfig, config_dict: dict[str, Any], folder: Path, body: Callable[[run_record.Run, Trainer], None]
) -> None:
    """Set up the process and the Trainer, lock the run folder, and call body(run, trainer) on every rank.

    Only rank 0 locks and writes the folder. config_dict: the config as it is recorded. If the run is done already,
    `body` is not called.
    """
    setup_process(config)
    trainer = make_trainer(config, config_dict, folder)
    with _process_group(trainer), ExitStack() as stack:
        acquired: list[run_record.Run] = []  # on rank 0 the run, unless it is done already

        def acquire() -> bool:
            overrides = list(HydraConfig.get().overrides.task)
            run = stack.enter_context(run_record.acquire_run(folder, config_dict, overrides, input_files(config)))
            if run is not None:
                acquired.append(run)
                stack.enter_context(track_run_status(trainer, config_dict, folder))
                stack.enter_context(logging_to(folder))
            return bool(acquired)

        if broadcast_from_rank_zero(trainer, acquire):
            run = acquired[0] if acquired else run_record.Run(folder, {"config": config_dict}, writes=False)
            run.update(ranks=_same_on_all_ranks(trainer, config_dict))
            if acquired:
                warn_of_slow_bf16(trainer, config.policy)
            with reraise_stop():
                body(run, trainer)
        elif trainer.is_global_zero:
            print(f"{folder}: this run is done already", flush=True)


def _same_on_all_ranks(trainer: Trainer, config_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rank, host, process id and config digest of every rank. Raise RuntimeError if their configs differ."""
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    ranks = all_gather_object({"rank": trainer.global_rank, **process, "config": config_digest(config_dict)})
    if len({rank["config"] for rank in ranks}) > 1:
        raise RuntimeError(f"ranks run different configs: {ranks}")
    return ranks


def broadcast_from_rank_zero(trainer: Trainer, decide: Callable[[], T]) -> T:
    """Call decide() on rank 0 and return its result on every rank; raise its refusal on every rank."""
    decision: Any = None
    refusal: Exception | None = None
    if trainer.is_global_zero:
        try:
            decision = decide()
        except (*REFUSALS, RunFailed) as error:
            refusal = error
    decision, refusal = trainer.strategy.broadcast((decision, refusal))
    if refusal is not None:
        raise refusal
    return decision


def find_checkpoint(run: run_record.Run, trainer: Trainer) -> Resume:
    """Return where this run resumes. Raise CheckpointError if every checkpoint of an earlier attempt is damaged."""

    def decide() -> Resume:
        folder = run.folder / run_record.CHECKPOINTS
        remove_leftovers(folder)
        return Resume(newest(folder), run.record.get("steps")) if run.resumes else Resume()

    return broadcast_from_rank_zero(trainer, decide)


def setup_process(config: RunConfig) -> None:
    """Check the packages that the task needs, and set up torch and the logging of libraries in this process."""
    if config.data.uses_task:
        config.data.task.check()
    disable_progress_bar()  # transformers' progress bars last milliseconds here
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    setup_torch(config.threads, on_cpu=config.trainer.get("accelerator") == "cpu")


def make_trainer(config: RunConfig, config_dict: dict[str, Any], folder: Path) -> Trainer:
    """Return Lightning's Trainer with its callbacks and without loggers. Raise ConfigError if it can't be created."""
    settings = dict(config_dict["trainer"])
    try:
        callbacks = [instantiate_checked(node, Callback) for node in config_dict["callbacks"].values()]
        callbacks += [Throughput(), TimeLimit(settings.pop("max_time", None))]
        plan = {"default_root_dir": folder, "use_distributed_sampler": False, "plugins": [VerifiedCheckpointIO()]}
        trainer = instantiate_checked(settings, Trainer, logger=False, callbacks=callbacks, **plan)
        check_device_precision(settings, trainer)
    except (HydraException, TargetRefused) as error:
        raise ConfigError(f"the trainer or a callback can't be created: {last_line(error)}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"the trainer can't be created: {last_line(error)}") from error
    if config.data.batch_size < trainer.world_size:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: {trainer.world_size} devices need a pair each in every step;"
            f" type data.batch_size={trainer.world_size} or more"
        )
    set_up_device(trainer.strategy)
    return trainer


def forward_settings(trainer: Trainer) -> Forward:
    """Return the device and the autocast context in which the trainer runs forward passes."""
    return Forward(trainer.strategy.root_device, trainer.precision_plugin.forward_context)


def record_inputs(run: run_record.Run, trainer: Trainer, inputs: TrainingInputs) -> None:
    """Record hashes of the run's inputs. Raise RunRefused if it resumes a run that had other inputs."""

    def record() -> None:
        identity = inputs.identity()
        run.check_inputs_unchanged(**identity)
        run.update(data=dict(inputs.counts), initial_policy=identity["initial_policy"])

    broadcast_from_rank_zero(trainer, record)


def train(
    config: RunConfig,
    config_dict: Mapping[str, Any],
    run: run_record.Run,
    trainer: Trainer,
    module: BaseModule,
    inputs: TrainingInputs,
) -> None:
    """Train the module's model, from the first step or from the last checkpoint of an earlier attempt."""
    resume = find_checkpoint(run, trainer)
    if run.resumes:
        log.info("resuming from %s", resume.checkpoint or "the start: no checkpoint was reached")
    if resume.trained_to is not None:
        trainer.fit_loop.epoch_loop.max_steps = resume.trained_to
    step, started = step_of(resume.checkpoint) if resume.checkpoint else 0, run.record.get("started", "")
    add_loggers(trainer, config_dict, run.folder, step, started=started, charts=module.charts)
    fit(config, trainer, module, inputs, resume.checkpoint)


def fit(
    config: RunConfig, trainer: Trainer, module: BaseModule, inputs: TrainingInputs, checkpoint: Path | None = None
) -> None:
    """Train the module's model up to max_steps, from the first step or from a checkpoint.

    A checkpoint of the last step exists when it returns. Raises StopSignal, after saving a checkpoint, when the run is
    asked to stop. The process group stays open.
    """
    data = PreferenceDataModule(
        inputs.train,
        inputs.held_out,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    if config.policy.gradient_checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    with StopRequest() as module.request:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
        if any(isinstance(callback, Checkpointing) and callback.owes_validation for callback in callbacks):
            trainer.validate(module, datamodule=data, verbose=False)  # it was stopped between its last step and this
    if module.request.signum is not None:  # the signal came after the last step
        signal.raise_signal(module.request.signum)


def finalize_run(
    run: run_record.Run,
    trainer: Trainer,
    metrics: Mapping[str, Estimate],
    labels: Mapping[str, str],
    trained: Policy,
    timer: StageTimer,
    peak: int,
    next_commands: Sequence[str],
    samples: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write the results to the record and the loggers, draw the figures, write the model card, and print the summary.

    Only rank 0 calls it. labels: of the metrics that the table shows, in its order; peak: the peak memory in bytes.
    """
    findings = final_findings(run, trainer, metrics)
    run.update(
        metrics={name: estimate.as_record() for name, estimate in metrics.items()},
        metric_labels=dict(labels),
        trained_policy=weights_digest(trained.model),
        samples=list(samples[:16]),
        health=[finding.as_record() for finding in findings],
        seconds=timer.stop("evaluate"),
        peak_memory_bytes=peak,
    )
    remove_figures(run.folder)  # those of an earlier attempt
    figures = draw_run(run.folder) if run.record["config"]["figures"] else []
    log_final_metrics(trainer, metrics, samples, [path for path in figures if path.suffix == ".png"])
    (run.folder / "policy" / "README.md").write_text(model_card(run.record))
    log.info("CPU seconds: %s", ", ".join(f"{k} {v['cpu']:.0f}" for k, v in run.record["seconds"].items()))
    print_health(plain_console(), findings)
    print_summary(plain_console(), metrics, labels, samples, run.folder, next_commands, cost_rows(run.record))


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log this package's messages to the terminal and to `run.log`, which also gets warnings and the error."""
    console, file = log_handler(), logging.FileHandler(folder / "run.log")
    file.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    for handler in (console, file):
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.captureWarnings(True)  # libraries' warnings go to the file, not between progress bars
    logging.getLogger("py.warnings").addHandler(file)
    logging.getLogger("py.warnings").propagate = False
    try:
        yield
    except REFUSALS:
        raise  # the command prints it in one line
    except Exception as error:
        if line := str(error) if isinstance(error, RunFailed) else explain_disk_error(error):
            file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": f"the run failed: {line}"}))
        else:
            log.exception("the run failed")
        raise
    finally:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)


@contextmanager
def _process_group(trainer: Trainer) -> Iterator[None]:
    """Initialise the process group if there are several ranks, and destroy it at the end."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
