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
from dpo_lab.evals.held_out import LABELS, heldout_loss
from dpo_lab.models.policy import TinyPolicy, trainable_copy
from dpo_lab.pipelines.eval_inputs import save_trained_policy
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_responses
from dpo_lab.pipelines.session import finalize_run, forward_settings, open_session, record_inputs, setup_process, train
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.runs import run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.training.callbacks.throughput import throughput
from dpo_lab.training.initial_policy import initial_policy
from dpo_lab.training.memory import peak_memory
from dpo_lab.training.sft_module import SFTModule


def train_sft(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Train `config` in `folder`; the embedded policy goes to the cache instead. A finished run is not started again.

    Raises ConfigError if the config sets label noise, or a text column of generated data.
    """
    if config.sft.text_column is not None and config.data.uses_task:
        raise ConfigError(
            f"sft.text_column={config.sft.text_column}: the task has no columns; type data.path=FILE.jsonl too"
        )
    if config.is_embedded:
        with suppress(OSError):
            os.removedirs(folder)  # Hydra created it, and it stays empty
        _make_initial_policy(config)
        return
    if config.noise != Symmetric(seed=config.noise.seed):
        raise ConfigError(
            "noise: supervised fine-tuning learns chosen responses as labelled, without label noise; type noise=none"
        )
    config_dict = sft_record(cfg, config)
    open_session(config, config_dict, folder, lambda run, trainer: _run_pipeline(config, config_dict, run, trainer))


def _make_initial_policy(config: RunConfig) -> None:
    """Train the embedded initial policy unless the cache holds it, and print where it is."""
    assert isinstance(config.policy, TinyPolicy)
    setup_process(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.task, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _run_pipeline(config: RunConfig, config_dict: dict[str, Any], run: run_record.Run, trainer: Trainer) -> None:
    """Prepare the inputs, train, gather the policy, measure, and write the run's record; every rank calls it."""
    timer = StageTimer(run.record.get("seconds"))
    inputs = prepare_responses(config, CACHE)
    record_inputs(run, trainer, inputs)
    run.update(seconds=timer.stop("prepare"))
    module = _fit(config, config_dict, run, trainer, inputs)
    run.update(steps=trainer.global_step, tokens=module.tokens, seconds=timer.stop("sft"), **throughput(trainer))
    forward = forward_settings(trainer)
    trained = save_trained_policy(config, run, trainer, module, inputs, forward)
    tokens, initial = config.data.tokens_per_microbatch, inputs.initial.model
    metrics = heldout_loss(trained.model, initial, inputs.held_out, tokens, forward.context)
    peak = peak_memory(forward.device)
    if run.writes:
        commands = after_sft(config, run.record["overrides"], run.folder)
        finalize_run(run, trainer, metrics, LABELS, trained, timer, peak, commands)


def _fit(
    config: RunConfig, config_dict: dict[str, Any], run: run_record.Run, trainer: Trainer, inputs: TrainingInputs
) -> SFTModule:
    """Train and return the module."""
    seed_everything(config.seed, workers=True, verbose=False)
    model = trainable_copy(inputs.initial.model).to(forward_settings(trainer).device)  # type: ignore[arg-type]
    module = SFTModule(
        model,
        config.optim,
        total_steps=trainer.max_steps,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
    )
    train(config, config_dict, run, trainer, module, inputs)
    return module
