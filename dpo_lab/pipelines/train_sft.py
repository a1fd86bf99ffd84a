"""The life of an SFT run: prepare policy and responses, train, measure the held-out loss, record."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from dpo_lab.cli.next_steps import after_sft
from dpo_lab.config.schema import ConfigError, RunConfig, sft_record
from dpo_lab.evals.held_out import LABELS, heldout_loss
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.policy import TinyPolicy
from dpo_lab.models.sharding import on_device
from dpo_lab.pipelines.inputs import prepare_responses
from dpo_lab.pipelines.session import Session, open_session
from dpo_lab.pipelines.setup import setup_process
from dpo_lab.runs.cache import CACHE
from dpo_lab.training.callbacks.throughput import throughput
from dpo_lab.training.initial_policy import initial_policy
from dpo_lab.training.sft_module import SFTModule


def train_sft(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Train `config` in `folder`; the embedded policy goes to the cache instead. A finished run is not started again.

    Raises ConfigError if the config sets label noise, a trajectory, or a text column of generated data.
    """
    if config.sft.text_column is not None and config.data.uses_task:
        raise ConfigError(
            f"sft.text_column={config.sft.text_column}: the task has no columns; type data.path=FILE.jsonl too"
        )
    if config.evals.every:
        raise ConfigError(f"evals.every={config.evals.every}: supervised fine-tuning has no trajectory; leave it out")
    if config.is_embedded:
        with suppress(OSError):
            os.removedirs(folder)  # Hydra created it, and it stays empty
        _make_initial_policy(config)
        return
    if not config.noise.is_none:
        raise ConfigError(
            "noise: supervised fine-tuning learns chosen responses as labelled, without label noise; type noise=none"
        )
    with open_session(config, sft_record(cfg, config), folder) as session:
        if session is not None:
            _run_stages(session)


def _make_initial_policy(config: RunConfig) -> None:
    """Train the embedded initial policy unless the cache holds it, and print where it is."""
    assert isinstance(config.policy, TinyPolicy)
    setup_process(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.task, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _run_stages(session: Session) -> None:
    """Prepare the inputs, train, gather the policy, measure, and write the run's record."""
    config, run, trainer, forward = session.config, session.run, session.trainer, session.forward
    inputs = prepare_responses(config, CACHE, forward)
    session.record_inputs(inputs)
    run.update(seconds=session.timer.stop("prepare"))
    seed_everything(config.seed, workers=True, verbose=False)
    tokens = config.data.forward_tokens
    model = on_device(trainable_copy(inputs.initial.model), forward.device)
    module = SFTModule(model, config.optim, total_steps=trainer.max_steps, tokens_per_microbatch=tokens)
    session.train(module, inputs, session.preference_data(inputs))
    seconds = session.timer.stop("sft")
    run.update(steps=trainer.global_step, tokens=module.tokens, seconds=seconds, **throughput(trainer))
    trained = session.save_trained(module, inputs)
    metrics = heldout_loss(trained.model, inputs.initial.model, inputs.held_out, tokens, forward.context)
    session.finish(metrics, LABELS, trained, after_sft)
