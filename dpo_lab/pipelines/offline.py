"""Prepare training on given pairs: the reference, the check at step 0, and the module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import seed_everything
from transformers import PreTrainedModel

from dpo_lab.data.collate import collate
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.reference import reference_model
from dpo_lab.models.sharding import on_device
from dpo_lab.pipelines.inputs import TrainingInputs
from dpo_lab.pipelines.session import Session
from dpo_lab.rewards.base import ScoreTokens
from dpo_lab.runs.cache import CACHE
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.memory import MemoryTracker
from dpo_lab.training.step_level_module import module_for
from dpo_lab.training.step_zero import check_step_zero, first_batch

log = logging.getLogger("dpo_lab")


@dataclass
class Training:
    """What is trained and on what. memory: the measure of its memory; costs: returns what the record says of its costs;
    reward: that of a method that samples.
    """

    module: DPOModule
    data: PreferenceDataModule
    memory: MemoryTracker
    costs: Callable[[], dict[str, Any]] = dict
    reward: ScoreTokens | None = None


def start_training(session: Session, inputs: TrainingInputs) -> tuple[PreTrainedModel, MemoryTracker]:
    """Seed the run, and return a copy of the initial policy to train, on its device, and the measure of its memory."""
    config, device = session.config, session.forward.device
    seed_everything(config.seed, workers=True, verbose=False)
    memory = MemoryTracker(device)
    if config.policy.has_adapters:  # the base is held once on the device
        on_device(inputs.initial.model, device)
    return on_device(trainable_copy(inputs.initial.model), device), memory


def prepare_offline(session: Session, inputs: TrainingInputs) -> Training:
    """Prepare the reference, check the loss at step 0, and return the module to train on the pairs of `inputs`.

    Records the loss at step 0, None if the reference is not the initial policy.
    """
    config, run, forward = session.config, session.run, session.forward
    train, held_out = config.loss.prepare(inputs.train), config.loss.prepare(inputs.held_out)
    inputs = replace(inputs, train=train, held_out=held_out)
    model, memory = start_training(session, inputs)
    tokens = config.data.forward_tokens
    pairs = inputs.train.concat(inputs.held_out)
    scored = pairs if pairs.unrelated is None else pairs.concat(pairs.unrelated)
    reference = config.reference.prepare(model, scored, CACHE, forward.context, tokens)
    memory.count_weights(model, reference_model(reference))
    step_zero_loss = None
    batch = collate(inputs.train[: config.data.batch_size]).to(forward.device)
    with forward.context():
        if config.reference.starts_at_policy:
            step_zero_loss = check_step_zero(model, config.loss, reference, batch, tokens)
            log.info("step 0: loss %.6f, policy and reference agree", step_zero_loss)
        else:
            run.update(first_batch=first_batch(model, config.loss, reference, batch, tokens))
    run.update(step_zero_loss=step_zero_loss, seconds=session.timer.stop("reference"))
    module = module_for(config.loss)(
        model,
        config.loss,
        reference,
        config.optim,
        total_steps=session.trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=tokens,
    )
    return Training(module, session.preference_data(inputs), memory)
