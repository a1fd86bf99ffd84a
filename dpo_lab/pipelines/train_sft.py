"""The life of an SFT run: prepare policy and responses, train, measure the held-out loss, record."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from dpo_lab.cli.next_steps import after_sft
from dpo_lab.config.schema import ConfigError, RunConfig, sft_record
from dpo_lab.core.noise import Symmetric
from dpo_lab.evals.held_out import heldout_loss
from dpo_lab.models.policy import TinyPolicy, trainable_copy
from dpo_lab.pipelines.eval_inputs import trained_policy
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_responses
from dpo_lab.pipelines.session import finalize_run, forward_settings, open_session, record_inputs, setup_process, train
from dpo_lab.runs import run_record
from dpo_lab.runs.atomic_write import atomic_path
from dpo_lab.runs.cache import CACHE
from dpo_lab.training.callbacks.early_stopping import keep_policy
from dpo_lab.training.callbacks.throughput import StageTimer, throughput
from dpo_lab.training.initial_policy import initial_policy
from dpo_lab.training.master_weights import moved_weights
from dpo_lab.training.memory import peak_memory
from dpo_lab.training.sft_module import SFTModule


def train_sft(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Run `config` in `folder`, a finished run is left alone; the embedded policy is kept in the cache instead."""
    if config.sft.text_column is not None and config.data.is_world:
        raise ConfigError(
            f"sft.text_column={config.sft.text_column}: a world has no columns; type data.path=FILE.jsonl with it"
        )
    if config.is_embedded:
        with suppress(OSError):
            os.removedirs(folder)  # Hydra made it, and nothing will lie in it
        _make_initial_policy(config)
        return
    if config.noise != Symmetric(seed=config.noise.seed):
        raise ConfigError(
            "noise: responses are learned as the annotator chose them, without label noise; type noise=none"
        )
    plain = sft_record(cfg, config)
    open_session(config, plain, folder, lambda held, trainer: _whole_run(config, plain, held, trainer))


def _make_initial_policy(config: RunConfig) -> None:
    """The embedded initial policy alone, made unless the cache has it."""
    assert isinstance(config.policy, TinyPolicy)
    setup_process(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.world, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _whole_run(config: RunConfig, plain: dict[str, Any], held: run_record.Run, trainer: Trainer) -> None:
    clock = StageTimer(held.record.get("seconds"))
    material = prepare_responses(config, CACHE)
    record_inputs(held, trainer, material)
    held.update(seconds=clock.lap("prepare"))
    module = _fit(config, plain, held, trainer, material)
    held.update(steps=trainer.global_step, tokens=module.tokens, seconds=clock.lap("sft"), **throughput(trainer))
    forward = forward_settings(trainer)
    trained = trained_policy(module, material, forward)
    held.update(**keep_policy(trainer, trained.model))
    if moved := moved_weights(trained.model, material.initial.model):
        held.update(moved_weights=moved)
    if held.writes:
        with atomic_path(held.folder / "policy") as folder:
            config.policy.to_save(trained).save(folder)
    tokens, initial = config.data.tokens_per_microbatch, material.initial.model
    metrics = heldout_loss(trained.model, initial, material.held_out, tokens, forward.context)
    peak = peak_memory(forward.device)
    if held.writes:
        commands = after_sft(config, held.record["overrides"], held.folder)
        finalize_run(held, trainer, metrics, trained, clock, peak, commands)


def _fit(
    config: RunConfig, plain: dict[str, Any], held: run_record.Run, trainer: Trainer, material: TrainingInputs
) -> SFTModule:
    seed_everything(config.seed, workers=True, verbose=False)
    model = trainable_copy(material.initial.model).to(forward_settings(trainer).device)  # type: ignore[arg-type]
    module = SFTModule(
        model,
        config.optim,
        total_steps=trainer.max_steps,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
    )
    train(config, plain, held, trainer, module, material)
    return module
