"""The config of a reward model's training: as it is recorded, and as it follows from that of a run that needs one."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dpo_lab.config.schema import ConfigError, RunConfig, as_record, training_files, validate
from dpo_lab.core.methods.dpo import DPO
from dpo_lab.models.policy import PolicyConfig
from dpo_lab.rewards.learned import Learned
from dpo_lab.runs.fingerprint import config_digest, fingerprint
from dpo_lab.training.optim import Optim

UNUSED = ("beta", "method", "loss", "reference")  # in the training of a reward model
# Settings of evals that its evaluation uses.
EVALS = ("num_prompts", "max_new_tokens", "num_train_pairs", "batch_size", "calibration")
REWARD_MODEL = "reward_model"  # the key of its own settings in its record
SCALE_PROMPTS = 256  # for a reward model that a run needs, whatever its own evals.num_prompts
CALLBACKS = ("progress", "checkpoint", "health")  # those that it keeps of another run


def reward_record(cfg: DictConfig, config: RunConfig) -> dict[str, Any]:
    """Return the config of a reward model's training as nested dicts, without the settings that it does not use.

    Raises ConfigError if `reward` is not the learned one.
    """
    if not isinstance(config.reward, Learned):
        raise ConfigError("reward: only a learned one is trained; type reward=learned")
    config_dict = {key: value for key, value in as_record(cfg, config).items() if key not in UNUSED}
    evals = {key: config_dict["evals"][key] for key in EVALS}
    return config_dict | {"evals": evals, REWARD_MODEL: {"centring": config.reward.centring}}


def reward_model_run(cfg: DictConfig, config: RunConfig) -> tuple[DictConfig, RunConfig, str]:
    """Return the config of the reward model's training that a run needs, composed and typed, and its digest.

    The digest is of all that determines the reward model: data, noise, initial policy, seed, precision, and the settings
    of `reward`. The settings of the run's own training, such as beta, optim and trainer.max_steps, have no part in it, nor
    has evals.num_prompts: mean and standard deviation of its scores are those on SCALE_PROMPTS prompts.
    """
    reward = config.reward
    assert isinstance(reward, Learned)
    made = copy.deepcopy(cfg)
    optim = Optim(lr=reward.learning_rate(config.policy), beta2=0.95)
    trainer = {
        "max_steps": reward.steps,
        "max_time": None,
        "val_check_interval": max(1, reward.steps // 2),
        "log_every_n_steps": 10,
    }
    with open_dict(made):
        made.name, made.if_exists, made.figures, made.optimized_metric, made.logger = (
            "reward",
            "restart",
            False,
            None,
            {},
        )
        made.method = OmegaConf.structured(DPO)  # which determines nothing of it
        made.optim = OmegaConf.structured(optim)
        made.data.batch_size = reward.batch_size
        made.evals.num_prompts = SCALE_PROMPTS
        made.trainer.update(trainer)
        made.callbacks = {name: node for name, node in made.callbacks.items() if name in CALLBACKS}
    settings = validate(made)
    record = reward_record(made, settings)
    files = {name: each["blake2b"] for name, each in fingerprint(training_files(settings)).items()}
    text = json.dumps([config_digest(record), reward.steps, files])
    return made, settings, hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def learning_rate(*, _root_: DictConfig) -> float:
    """Return the default learning rate of dpo_lab.reward, a resolver of its config: that of reward=learned."""
    reward, policy = (OmegaConf.to_object(_root_[name]) for name in ("reward", "policy"))
    assert isinstance(policy, PolicyConfig)
    return reward.learning_rate(policy) if isinstance(reward, Learned) else 0.0


def register() -> None:
    """Register the resolver with OmegaConf."""
    OmegaConf.register_new_resolver("reward_learning_rate", learning_rate, replace=True)


def with_reward_model(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config with the folder of the reward model that was made for it."""
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, path=str(folder)))  # type: ignore[call-arg]
