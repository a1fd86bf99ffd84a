"""One run's life: hold the folder, prepare policy, pairs and reference, check step 0, fit, evaluate, record, summarise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from dpo_lab.config import ConfigError, RunConfig, as_record
from dpo_lab.data.advice import advice
from dpo_lab.data.collate import collate
from dpo_lab.evals.evaluation import evaluate
from dpo_lab.fit import begin, finish, forward_of, live, train
from dpo_lab.measure import judge_of, subject_of, trained_policy
from dpo_lab.models.policy import to_train
from dpo_lab.models.reference import model_behind
from dpo_lab.next_commands import after_training
from dpo_lab.prepare import Material, prepare
from dpo_lab.results import runs
from dpo_lab.results.cache import CACHE
from dpo_lab.results.examples import EXAMPLES
from dpo_lab.results.files import made_whole
from dpo_lab.results.health import of_folder
from dpo_lab.training.checks import check_step_zero, first_batch
from dpo_lab.training.cost import Clock, throughput
from dpo_lab.training.early_stopping import keep_policy
from dpo_lab.training.master_weights import moved_weights
from dpo_lab.training.memory import Memory, peak_memory
from dpo_lab.training.module import DPOModule

log = logging.getLogger("dpo_lab")


def run(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Run `config` in `folder`, by itself or as one rank of several; a finished run is left alone."""
    if config.sft.text_column is not None or config.data.has_texts:
        raise ConfigError(
            "sft.text_column, data.format=text: whole texts hold no preference; type them with python -m dpo_lab.sft"
        )
    plain = as_record(cfg, config)
    live(config, plain, folder, lambda held, trainer: _whole_run(config, plain, held, trainer))


def _whole_run(config: RunConfig, plain: dict[str, Any], held: runs.Run, trainer: Trainer) -> None:
    clock = Clock(held.record.get("seconds"))
    forward = forward_of(trainer)
    judge = judge_of(config, forward.device)  # before the training: one that can't be had is said now
    material = prepare(config, CACHE, forward)
    quality = material.quality()
    for line in advice(quality):
        log.warning("data: %s", line)
    begin(held, trainer, material)
    held.update(data_quality=quality.as_record(), seconds=clock.lap("prepare"))
    module = _fit(config, plain, held, trainer, material, clock)
    held.update(steps=trainer.global_step, seconds=clock.lap("dpo"), **throughput(trainer))
    trained = trained_policy(module, material, forward)
    held.update(**keep_policy(trainer, trained.model))
    if moved := moved_weights(trained.model, material.initial.model):
        held.update(moved_weights=moved)
    if held.writes:
        with made_whole(held.folder / "policy") as folder:
            config.policy.to_save(trained).save(folder)
    subject = subject_of(config, material, trained, forward, judge)
    metrics, samples = evaluate(subject, config.evals.evaluators()), subject.side_by_side
    peak = peak_memory(forward.device)
    if held.writes:
        subject.examples.write(held.folder / EXAMPLES)
        commands = after_training(config, held.record["overrides"], held.folder)
        finish(held, trainer, metrics, trained, clock, peak, commands, samples)


def _fit(
    config: RunConfig, plain: dict[str, Any], held: runs.Run, trainer: Trainer, material: Material, clock: Clock
) -> DPOModule:
    """Train; gives the module. The record has the loss before the first step (None without a starting reference)."""
    seed_everything(config.seed, workers=True, verbose=False)
    forward = forward_of(trainer)
    memory = Memory(forward.device)
    model = to_train(material.initial.model).to(forward.device)  # type: ignore[arg-type]
    pairs, tokens = material.train.joined(material.held_out), config.data.tokens_per_microbatch
    reference = config.reference.prepare(model, pairs, CACHE, forward.context, tokens)
    memory.holds(model, model_behind(reference))
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
