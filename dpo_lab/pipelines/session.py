"""A run in progress: what its stages share, and the stages that every kind of run has."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer

from dpo_lab.config.precision import warn_of_slow_bf16
from dpo_lab.config.schema import RunConfig, input_files
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.data.sources import AUTO
from dpo_lab.distributed.collectives import all_gather_object, broadcast_object
from dpo_lab.distributed.signals import StopRequest, reraise_stop
from dpo_lab.health.diagnose import print_health
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.models.sharded_weights import gather_model, kept_on_disk, set_digest
from dpo_lab.models.sharding import is_sharded, on_device
from dpo_lab.pipelines.inputs import TrainingInputs
from dpo_lab.pipelines.loggers import add_loggers, log_final_metrics, track_run_status
from dpo_lab.pipelines.setup import (
    broadcast_from_rank_zero,
    forward_settings,
    logging_to,
    make_trainer,
    memory_explained,
    process_group,
    setup_process,
)
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.reporting.figures import draw_run, remove_figures
from dpo_lab.reporting.model_card import model_card
from dpo_lab.reporting.run_summary import cost_rows, print_summary
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import atomic_path
from dpo_lab.runs.fingerprint import config_digest
from dpo_lab.runs.run_record import Run, RunBusy
from dpo_lab.stats.estimates import Estimate
from dpo_lab.terminal.progress import plain_console
from dpo_lab.training.activation_offload import offload_activations
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.checkpointing import Checkpointing
from dpo_lab.training.callbacks.early_stopping import keep_policy
from dpo_lab.training.callbacks.health import final_findings
from dpo_lab.training.callbacks.throughput import throughput
from dpo_lab.training.checkpoint_io import newest, remove_leftovers, step_of
from dpo_lab.training.master_weights import moved_weights
from dpo_lab.training.memory import MemoryTracker, peak_memory
from dpo_lab.training.microbatch import find_tokens

log = logging.getLogger("dpo_lab")

POLICY = "policy"  # in a run folder


class Session:
    """A run in progress on this rank: its settings, its record, its Trainer, and the timer of its stages.

    config_dict: the config as it is recorded; forward: the device and autocast context of passes outside of training.
    All ranks have to call every method.
    """

    def __init__(self, config: RunConfig, config_dict: Mapping[str, Any], run: Run, trainer: Trainer) -> None:
        self.config, self.config_dict, self.run, self.trainer = config, config_dict, run, trainer
        self.forward = forward_settings(trainer)
        self.timer = StageTimer(run.record.get("seconds"))
        self.saved = run.folder / POLICY  # where the trained model is

    def record_inputs(self, inputs: TrainingInputs) -> None:
        """Record hashes of the run's inputs. Raise RunRefused if it resumes a run that had other inputs."""

        def record() -> None:
            identity = inputs.identity()
            self.run.check_inputs_unchanged(**identity)
            self.run.update(data=dict(inputs.counts), initial_policy=identity["initial_policy"])

        broadcast_from_rank_zero(self.trainer, record)

    def preference_data(self, inputs: TrainingInputs) -> PreferenceDataModule:
        """Return the loaders of the pairs of `inputs`."""
        data = self.config.data
        return PreferenceDataModule(
            inputs.train,
            inputs.held_out,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            seed=self.config.seed,
        )

    def train(self, module: BaseModule, inputs: TrainingInputs, data: PreferenceDataModule) -> None:
        """Train the module's model on data, from the first step or from the last checkpoint of an earlier attempt."""
        run, trainer = self.run, self.trainer
        self._choose_memory(module, data)
        resume = broadcast_from_rank_zero(trainer, lambda: _find_checkpoint(run))
        if run.resumes:
            log.info("resuming from %s", resume.checkpoint or "the start: no checkpoint was reached")
        if resume.trained_to is not None:
            trainer.fit_loop.epoch_loop.max_steps = resume.trained_to
        step, started = step_of(resume.checkpoint) if resume.checkpoint else 0, run.record.get("started", "")
        charts = {**data.charts, **module.charts}
        add_loggers(trainer, self.config_dict, run.folder, step, started=started, charts=charts)
        explained = memory_explained(self.config, "training", trains=True, tokens=module.tokens_per_microbatch)
        with explained, nullcontext() if self.config.evals.every else kept_on_disk(inputs.initial.model):
            fit(trainer, module, data, resume.checkpoint)

    def record_training(self, stage: str, memory: MemoryTracker, **costs: Any) -> None:
        """Record the training's steps, throughput, memory and costs, and the seconds of its stage; a collective."""
        measured, found = memory.as_record(), throughput(self.trainer)
        if found or "memory" not in self.run.record:  # a resumed run with no step left to train has measured nothing
            self.run.update(memory=measured)
        self.run.update(steps=self.trainer.global_step, seconds=self.timer.stop(stage), **found, **costs)

    def _choose_memory(self, module: BaseModule, data: PreferenceDataModule) -> None:
        """Set how the module saves memory, and the tokens of its micro-batches if a trial is to find them.

        A resumed run takes the number that was found first.
        """
        policy, run, device = self.config.policy, self.run, self.forward.device
        for model in module.trained_models():
            if policy.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            if policy.activation_offload and device.type == "cuda":
                offload_activations(causal_lm(model).base_model)
        if policy.activation_offload and device.type != "cuda":
            log.info("policy.activation_offload: without effect on %s, which has no memory of its own", device.type)
        if self.config.data.tokens_per_microbatch == AUTO:
            found = broadcast_from_rank_zero(self.trainer, lambda: run.record.get("tokens_per_microbatch"))
            if found is None:
                with memory_explained(self.config, "a trial of micro-batches", trains=True):
                    found = find_tokens(module, data, self.trainer.world_size, device, self.forward.context)
            module.tokens_per_microbatch = found
            run.update(tokens_per_microbatch=found)

    def save_trained(
        self,
        module: BaseModule,
        inputs: TrainingInputs,
        name: str = POLICY,
        export: Callable[[Policy], Policy] | None = None,
    ) -> Policy:
        """Return the trained model, in evaluation mode, on the device that it trained on, and save it in the folder `name`.

        export: returns what is saved, by default what the policy's config says. A sharded policy stays so; to be saved it is
        gathered in the memory of rank 0's host. Early stopping may keep an earlier policy; which one, and how many 16-bit
        weights moved, is recorded. Moves the initial policy to that device too. Lightning leaves a module on the CPU after
        a fit.
        """
        device = self.forward.device
        initial, model = on_device(inputs.initial.model, device), on_device(module.model, device)
        trained = Policy(model.eval(), inputs.initial.tokenizer)
        self.run.update(**keep_policy(self.trainer, model))
        if moved := moved_weights(model, initial):
            self.run.update(moved_weights=moved)
        whole = gather_model(model)
        if is_sharded(model):
            set_digest(model, broadcast_object(None if whole is None else weights_digest(whole)))
        if self.run.writes:
            assert whole is not None
            with atomic_path(self.run.folder / name) as folder:
                (export or self.config.policy.export)(Policy(whole, trained.tokenizer)).save(folder)
        self.saved = self.run.folder / name
        return trained

    def finish(
        self,
        metrics: Mapping[str, Estimate],
        labels: Mapping[str, str],
        trained: Policy,
        next_steps: Callable[[RunConfig, Sequence[str], Path], Sequence[str]],
        samples: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Write the results to the record and the loggers, draw the figures, write the model card, print the summary.

        labels: of the metrics that the table shows, in its order; next_steps: returns the commands to suggest, from the
        config, the overrides and the folder; samples: of both policies, side by side.
        """
        run, peak = self.run, peak_memory(self.forward.device)
        if not run.writes:
            return
        findings = final_findings(run, self.trainer, metrics)
        run.update(
            metrics={name: estimate.as_record() for name, estimate in metrics.items()},
            metric_labels=dict(labels),
            trained_policy=weights_digest(trained.model),
            samples=list(samples[:16]),
            health=[finding.as_record() for finding in findings],
            seconds=self.timer.stop("evaluate"),
            peak_memory_bytes=peak,
        )
        remove_figures(run.folder)  # those of an earlier attempt
        figures = draw_run(run.folder) if self.config.figures else []
        log_final_metrics(self.trainer, metrics, samples, [path for path in figures if path.suffix == ".png"])
        (self.saved / "README.md").write_text(model_card(run.record))
        log.info("CPU seconds: %s", ", ".join(f"{k} {v['cpu']:.0f}" for k, v in run.record["seconds"].items()))
        console, commands = plain_console(), next_steps(self.config, run.record["overrides"], run.folder)
        print_health(console, findings)
        print_summary(console, metrics, labels, samples, run.folder, commands, cost_rows(run.record))


@contextmanager
def open_session(
    config: RunConfig,
    config_dict: dict[str, Any],
    folder: Path,
    overrides: Sequence[str] | None = None,
    waits: bool = False,
) -> Iterator[Session | None]:
    """Set up the process and the Trainer, lock the run folder, and yield the session on every rank.

    Only rank 0 locks and writes the folder. config_dict: the config as it is recorded; overrides: as recorded, None:
    those typed; waits: while another process holds the lock, instead of raising RunBusy. Yields None if the run is done
    already. If the body raises, the record says how the run ended.
    """
    setup_process(config)
    trainer = make_trainer(config, config_dict, folder)
    with process_group(trainer), ExitStack() as stack:
        acquired: list[Run] = []  # on rank 0 the run, unless it is done already

        def acquire() -> bool:
            typed = list(HydraConfig.get().overrides.task) if overrides is None else overrides
            run = stack.enter_context(run_record.acquire_run(folder, config_dict, typed, input_files(config)))
            if run is not None:
                acquired.append(run)
                stack.enter_context(track_run_status(trainer, config_dict, folder))
                stack.enter_context(logging_to(folder))
            return bool(acquired)

        if not _acquired(trainer, acquire, waits):
            if trainer.is_global_zero and not waits:
                print(f"{folder}: this run is done already", flush=True)
            yield None
            return
        run = acquired[0] if acquired else Run(folder, {"config": config_dict}, writes=False)
        run.update(ranks=_same_on_all_ranks(trainer, config_dict))
        if acquired:
            warn_of_slow_bf16(trainer, config.policy)
        with reraise_stop(), memory_explained(config, "a pass before or after training"):
            yield Session(config, config_dict, run, trainer)


def _acquired(trainer: Trainer, acquire: Callable[[], bool], waits: bool) -> bool:
    """Return acquire() of rank 0 on every rank; while it raises RunBusy, call it again every second if `waits`."""
    while True:  # in collectives of a second each, which no group's time limit ends
        try:
            return broadcast_from_rank_zero(trainer, acquire)
        except RunBusy:
            if not waits:
                raise
            time.sleep(1)


def _same_on_all_ranks(trainer: Trainer, config_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rank, host, process id and config digest of every rank. Raise RuntimeError if their configs differ."""
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    ranks = all_gather_object({"rank": trainer.global_rank, **process, "config": config_digest(config_dict)})
    if len({rank["config"] for rank in ranks}) > 1:
        raise RuntimeError(f"ranks run different configs: {ranks}")
    return ranks


@dataclass(frozen=True)
class Resume:
    """Where training resumes: the checkpoint (None: the start), and the number of steps if it had finished."""

    checkpoint: Path | None = None
    trained_to: int | None = None


def _find_checkpoint(run: Run) -> Resume:
    """Return where this run resumes. Raise CheckpointError if every checkpoint of an earlier attempt is damaged."""
    folder = run.folder / run_record.CHECKPOINTS
    remove_leftovers(folder)
    return Resume(newest(folder), run.record.get("steps")) if run.resumes else Resume()


def fit(trainer: Trainer, module: BaseModule, data: PreferenceDataModule, checkpoint: Path | None = None) -> None:
    """Train the module's model up to max_steps, from the first step or from a checkpoint.

    A checkpoint of the last step exists when it returns. Raises StopSignal, after saving a checkpoint, when the run is
    asked to stop. The process group stays open.
    """
    module.model.train()
    with StopRequest() as module.request:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
        if any(isinstance(callback, Checkpointing) and callback.owes_validation for callback in callbacks):
            trainer.validate(module, datamodule=data, verbose=False)  # it was stopped between its last step and this
    if module.request.signum is not None:  # the signal came after the last step
        signal.raise_signal(module.request.signum)
