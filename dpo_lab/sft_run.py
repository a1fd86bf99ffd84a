"""One run of supervised fine-tuning: prepare policy and responses, fit, measure the held-out loss, record, say what is next."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from dpo_lab.config import ConfigError, RunConfig, sft_record
from dpo_lab.core.noise import Symmetric
from dpo_lab.evals.held_out import held_out_loss
from dpo_lab.fit import begin, finish, forward_of, live, set_up, train
from dpo_lab.measure import trained_policy
from dpo_lab.models.policy import TinyPolicy, to_train
from dpo_lab.next_commands import after_sft
from dpo_lab.prepare import Material, prepare_responses
from dpo_lab.results import runs
from dpo_lab.results.cache import CACHE
from dpo_lab.results.files import made_whole
from dpo_lab.training.cost import Clock, throughput
from dpo_lab.training.early_stopping import keep_policy
from dpo_lab.training.master_weights import moved_weights
from dpo_lab.training.memory import peak_memory
from dpo_lab.training.sft import initial_policy
from dpo_lab.training.sft_module import SFTModule


def run_sft(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
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
    live(config, plain, folder, lambda held, trainer: _whole_run(config, plain, held, trainer))


def _make_initial_policy(config: RunConfig) -> None:
    """The embedded initial policy alone, made unless the cache has it."""
    assert isinstance(config.policy, TinyPolicy)
    set_up(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.world, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _whole_run(config: RunConfig, plain: dict[str, Any], held: runs.Run, trainer: Trainer) -> None:
    clock = Clock(held.record.get("seconds"))
    material = prepare_responses(config, CACHE)
    begin(held, trainer, material)
    held.update(seconds=clock.lap("prepare"))
    module = _fit(config, plain, held, trainer, material)
    held.update(steps=trainer.global_step, tokens=module.tokens, seconds=clock.lap("sft"), **throughput(trainer))
    forward = forward_of(trainer)
    trained = trained_policy(module, material, forward)
    held.update(**keep_policy(trainer, trained.model))
    if moved := moved_weights(trained.model, material.initial.model):
        held.update(moved_weights=moved)
    if held.writes:
        with made_whole(held.folder / "policy") as folder:
            config.policy.to_save(trained).save(folder)
    tokens, initial = config.data.tokens_per_microbatch, material.initial.model
    metrics = held_out_loss(trained.model, initial, material.held_out, tokens, forward.context)
    peak = peak_memory(forward.device)
    if held.writes:
        commands = after_sft(config, held.record["overrides"], held.folder)
        finish(held, trainer, metrics, trained, clock, peak, commands)


def _fit(config: RunConfig, plain: dict[str, Any], held: runs.Run, trainer: Trainer, material: Material) -> SFTModule:
    seed_everything(config.seed, workers=True, verbose=False)
    model = to_train(material.initial.model).to(forward_of(trainer).device)  # type: ignore[arg-type]
    module = SFTModule(
        model,
        config.optim,
        total_steps=trainer.max_steps,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
    )
    train(config, plain, held, trainer, module, material)
    return module
