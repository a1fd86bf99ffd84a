"""The life of a DPO run: prepare inputs, check step 0, train, evaluate, record, summarise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from dpo_lab.cli.next_steps import after_training
from dpo_lab.config.schema import ConfigError, RunConfig, as_record
from dpo_lab.data.collate import collate
from dpo_lab.data.warnings import data_warnings
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.health.diagnose import of_folder
from dpo_lab.models.policy import trainable_copy
from dpo_lab.models.reference import reference_model
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge, trained_policy
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_pairs
from dpo_lab.pipelines.session import finalize_run, forward_settings, open_session, record_inputs, train
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import atomic_path
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES
from dpo_lab.training.callbacks.early_stopping import keep_policy
from dpo_lab.training.callbacks.throughput import StageTimer, throughput
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.master_weights import moved_weights
from dpo_lab.training.memory import MemoryTracker, peak_memory
from dpo_lab.training.step_zero import check_step_zero, first_batch

log = logging.getLogger("dpo_lab")


def train_dpo(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Run `config` in `folder`, by itself or as one rank of several; a finished run is left alone."""
    if config.sft.text_column is not None or config.data.has_texts:
        raise ConfigError(
            "sft.text_column, data.format=text: whole texts hold no preference; type them with python -m dpo_lab.sft"
        )
    plain = as_record(cfg, config)
    open_session(config, plain, folder, lambda held, trainer: _whole_run(config, plain, held, trainer))


def _whole_run(config: RunConfig, plain: dict[str, Any], held: run_record.Run, trainer: Trainer) -> None:
    clock = StageTimer(held.record.get("seconds"))
    forward = forward_settings(trainer)
    judge = load_judge(config, forward.device)  # before the training: one that can't be had is said now
    material = prepare_pairs(config, CACHE, forward)
    quality = material.quality()
    for line in data_warnings(quality):
        log.warning("data: %s", line)
    record_inputs(held, trainer, material)
    held.update(data_quality=quality.as_record(), seconds=clock.lap("prepare"))
    module = _fit(config, plain, held, trainer, material, clock)
    held.update(steps=trainer.global_step, seconds=clock.lap("dpo"), **throughput(trainer))
    trained = trained_policy(module, material, forward)
    held.update(**keep_policy(trainer, trained.model))
    if moved := moved_weights(trained.model, material.initial.model):
        held.update(moved_weights=moved)
    if held.writes:
        with atomic_path(held.folder / "policy") as folder:
            config.policy.to_save(trained).save(folder)
    subject = build_eval_context(config, material, trained, forward, judge)
    metrics, samples = evaluate(subject, config.evals.evaluators()), subject.side_by_side
    peak = peak_memory(forward.device)
    if held.writes:
        subject.examples.write(held.folder / EXAMPLES)
        commands = after_training(config, held.record["overrides"], held.folder)
        finalize_run(held, trainer, metrics, trained, clock, peak, commands, samples)


def _fit(
    config: RunConfig,
    plain: dict[str, Any],
    held: run_record.Run,
    trainer: Trainer,
    material: TrainingInputs,
    clock: StageTimer,
) -> DPOModule:
    """Train; gives the module. The record has the loss before the first step (None without a starting reference)."""
    seed_everything(config.seed, workers=True, verbose=False)
    forward = forward_settings(trainer)
    memory = MemoryTracker(forward.device)
    model = trainable_copy(material.initial.model).to(forward.device)  # type: ignore[arg-type]
    pairs, tokens = material.train.joined(material.held_out), config.data.tokens_per_microbatch
    reference = config.reference.prepare(model, pairs, CACHE, forward.context, tokens)
    memory.holds(model, reference_model(reference))
    step_zero_loss = None
    batch = collate(material.train[: config.data.batch_size]).to(forward.device)
    with forward.context():
        if config.reference.starts_at_policy:
            step_zero_loss = check_step_zero(model, config.loss, reference, batch, tokens)
            log.info("step 0: loss %.6f, policy and reference agree", step_zero_loss)
        else:
            held.update(first_batch=first_batch(model, config.loss, reference, batch, tokens))
    held.update(step_zero_loss=step_zero_loss, seconds=clock.lap("reference"))
    module = DPOModule(
        model,
        config.loss,
        reference,
        config.optim,
        total_steps=trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=tokens,
    )
    try:
        train(config, plain, held, trainer, module, material)
    except BaseException:
        held.update(health=[finding.as_record() for finding in of_folder(held.folder, held.record)])
        raise
    measured = memory.as_record()
    if (
        throughput(trainer) or "memory" not in held.record
    ):  # a start that found all steps done has nothing better to say
        held.update(memory=measured)
    return module
