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
from dpo_lab.training.callbacks.throughput import StageTimer, Throughput
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO, newest, remove_leftovers, step_of
from dpo_lab.training.torch_setup import set_up_device, setup_torch

log = logging.getLogger("dpo_lab")

REFUSALS = (ConfigError, RunRefused, BadData, NoTemplate)  # what the user can mend: the door says it in one line
T = TypeVar("T")


@dataclass(frozen=True)
class Resume:
    """Where training goes on: the checkpoint (none: from the start), and at how many steps it was over already, if it was."""

    checkpoint: Path | None = None
    trained_to: int | None = None


def open_session(
    config: RunConfig, plain: dict[str, Any], folder: Path, body: Callable[[run_record.Run, Trainer], None]
) -> None:
    """Call body(run, trainer) on every rank of a run; rank 0 holds the folder. plain: the config as it is recorded.

    Where the run is done already nothing is called.
    """
    setup_process(config)
    trainer = make_trainer(config, plain, folder)
    with _process_group(trainer), ExitStack() as stack:
        held: list[run_record.Run] = []

        def take() -> bool:
            overrides = list(HydraConfig.get().overrides.task)
            run = stack.enter_context(run_record.acquire_run(folder, plain, overrides, input_files(config)))
            if run is not None:
                held.append(run)
                stack.enter_context(track_run_status(trainer, plain, folder))
                stack.enter_context(logging_to(folder))
            return bool(held)

        if broadcast_from_rank_zero(trainer, take):
            run = held[0] if held else run_record.Run(folder, {"config": plain}, writes=False)
            run.update(ranks=_same_on_all_ranks(trainer, plain))
            if held:
                warn_of_slow_bf16(trainer, config.policy)
            with reraise_stop():
                body(run, trainer)
        elif trainer.is_global_zero:
            print(f"{folder}: this run is done already", flush=True)


def _same_on_all_ranks(trainer: Trainer, plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Who the ranks are. Raises RuntimeError where they do not all run this very config."""
    mine = {
        "rank": trainer.global_rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "config": config_digest(plain),
    }
    ranks = all_gather_object(mine)
    if len({rank["config"] for rank in ranks}) > 1:
        raise RuntimeError(f"ranks run different configs: {ranks}")
    return ranks


def broadcast_from_rank_zero(trainer: Trainer, decide: Callable[[], T]) -> T:
    """What rank 0 decided, on every rank; its refusal is raised on every rank."""
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


def find_checkpoint(held: run_record.Run, trainer: Trainer) -> Resume:
    """What an earlier start left to go on from. Raises CheckpointError where all it left is damaged."""

    def decide() -> Resume:
        folder = held.folder / run_record.CHECKPOINTS
        remove_leftovers(folder)
        return Resume(newest(folder), held.record.get("steps")) if held.resumes else Resume()

    return broadcast_from_rank_zero(trainer, decide)


def setup_process(config: RunConfig) -> None:
    """Get the process ready to compute."""
    if config.data.is_world:
        config.data.world.check()
    disable_progress_bar()  # transformers' own bars, of milliseconds here
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    setup_torch(config.threads, on_cpu=config.trainer.get("accelerator") == "cpu")


def make_trainer(config: RunConfig, plain: dict[str, Any], folder: Path) -> Trainer:
    """Lightning's Trainer from its node, with callbacks, its device set up; it has no loggers until `add_loggers`."""
    settings = dict(plain["trainer"])
    try:
        callbacks = [instantiate_checked(node, Callback) for node in plain["callbacks"].values()]
        callbacks += [Throughput(), TimeLimit(settings.pop("max_time", None))]
        plan = {"default_root_dir": folder, "use_distributed_sampler": False, "plugins": [VerifiedCheckpointIO()]}
        trainer = instantiate_checked(settings, Trainer, logger=False, callbacks=callbacks, **plan)
        check_device_precision(settings, trainer)
    except (HydraException, TargetRefused) as error:
        raise ConfigError(f"the trainer or a callback can't be made: {last_line(error)}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"the trainer can't be made: {last_line(error)}") from error
    if config.data.batch_size < trainer.world_size:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: {trainer.world_size} devices need a pair each in every step;"
            f" type data.batch_size={trainer.world_size} or more"
        )
    set_up_device(trainer.strategy)
    return trainer


def forward_settings(trainer: Trainer) -> Forward:
    """What the trainer's forwards run on and under."""
    return Forward(trainer.strategy.root_device, trainer.precision_plugin.forward_context)


def record_inputs(held: run_record.Run, trainer: Trainer, material: TrainingInputs) -> None:
    """Note what the run works on. Raises RunRefused where it resumes a run that worked on something else."""

    def settle() -> None:
        identity = material.identity()
        held.settle(**identity)
        held.update(data=dict(material.counts), initial_policy=identity["initial_policy"])

    broadcast_from_rank_zero(trainer, settle)


def train(
    config: RunConfig,
    plain: Mapping[str, Any],
    held: run_record.Run,
    trainer: Trainer,
    module: BaseModule,
    material: TrainingInputs,
) -> None:
    """Train the module's model, from the start or from where an earlier start of the run was cut short."""
    resume = find_checkpoint(held, trainer)
    if held.resumes:
        log.info("resuming from %s", resume.checkpoint or "the start: no checkpoint was reached")
    if resume.trained_to is not None:
        trainer.fit_loop.epoch_loop.max_steps = resume.trained_to
    step, started = step_of(resume.checkpoint) if resume.checkpoint else 0, held.record.get("started", "")
    add_loggers(trainer, plain, held.folder, step, started=started, charts=module.charts)
    fit(config, trainer, module, material, resume.checkpoint)


def fit(
    config: RunConfig, trainer: Trainer, module: BaseModule, material: TrainingInputs, checkpoint: Path | None = None
) -> None:
    """Train the module's model on the material's token ids, up to max_steps, from the first step or on from a checkpoint.

    A checkpoint of the last step is there when it returns. Raises StopSignal, saved, when the run is asked to stop. Ranks stay
    joined.
    """
    data = PreferenceDataModule(
        material.train,
        material.held_out,
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
    if module.request.signum is not None:  # it came when no step was left to finish
        signal.raise_signal(module.request.signum)


def finalize_run(
    held: run_record.Run,
    trainer: Trainer,
    metrics: Mapping[str, Estimate],
    trained: Policy,
    clock: StageTimer,
    peak: int,
    next_commands: Sequence[str],
    samples: Sequence[Mapping[str, str]] = (),
) -> None:
    """Commit what the run came to, to the record and to the loggers, with its health, figures and the policy's card; say it.

    peak: bytes of memory. For rank 0.
    """
    found = final_findings(held, trainer, metrics)
    held.update(
        metrics={name: estimate.as_record() for name, estimate in metrics.items()},
        trained_policy=weights_digest(trained.model),
        samples=list(samples[:16]),
        health=[finding.as_record() for finding in found],
        seconds=clock.lap("evaluate"),
        peak_memory_bytes=peak,
    )
    remove_figures(held.folder)  # an earlier start's show other numbers
    figures = draw_run(held.folder) if held.record["config"]["figures"] else []
    log_final_metrics(trainer, metrics, samples, [path for path in figures if path.suffix == ".png"])
    (held.folder / "policy" / "README.md").write_text(model_card(held.record))
    log.info("CPU seconds: %s", ", ".join(f"{k} {v['cpu']:.0f}" for k, v in held.record["seconds"].items()))
    print_health(plain_console(), found)
    print_summary(plain_console(), metrics, samples, held.folder, next_commands, cost_rows(held.record))


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Our own lines on the terminal and in the run's log file."""
    console, file = log_handler(), logging.FileHandler(folder / "run.log")
    file.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    for handler in (console, file):
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.captureWarnings(True)  # libraries' warnings go to the file, not between the bars
    logging.getLogger("py.warnings").addHandler(file)
    logging.getLogger("py.warnings").propagate = False
    try:
        yield
    except REFUSALS:
        raise  # the door says it in one line
    except RunFailed as failure:
        file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": f"the run failed: {failure}"}))
        raise
    except Exception as error:
        if line := explain_disk_error(error):
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
    """The process group of all ranks, where there are several, from before anything is decided until all is done."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
