"""The reward of a run on fresh responses: the reward model that it needs, made once, and its function."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_lab.config.reward_model import reward_model_run, with_reward_model
from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.errors import LabError
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, distinct_prompts
from dpo_lab.pipelines.train_reward import FOLDER, train_reward
from dpo_lab.rewards import RewardError, RewardFunction, RewardInputs
from dpo_lab.rewards.base import ScoreTokens
from dpo_lab.rewards.learned import Learned
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.fingerprint import override_key

# Settings of dpo_lab.reward that are those of `reward` in a run that trains its reward model first.
SETTINGS = {"data.batch_size": "reward.batch_size", "optim.lr": "reward.lr", "trainer.max_steps": "reward.steps"}
# Groups of overrides that a reward model has in common with the run that needs it.
KEPT = ("ablation", "data", "evals", "noise", "policy", "seed", "sft", "threads", "trainer")


def ensure_reward_model(cfg: DictConfig, config: RunConfig) -> RunConfig:
    """Return the config with the folder of its reward model; train that first if reward=learned has no path.

    All ranks have to call it, before the session of the run. The reward model is a run of its own in the cache, under a
    digest of what determines it: it resumes where it was stopped, and of several runs that need it one trains it while the
    others wait.
    """
    if not isinstance(config.reward, Learned) or config.reward.path is not None:
        return config
    made, settings, digest = reward_model_run(cfg, config)
    folder = CACHE / f"reward-{digest}"
    try:
        train_reward(made, settings, folder, _overrides(settings), waits=True)
    except LabError as error:  # which names the settings of dpo_lab.reward
        for name, own in SETTINGS.items():
            error.args = (str(error).replace(name, own),)
        raise
    return with_reward_model(config, folder / FOLDER)


def prepare_reward(
    config: RunConfig, inputs: TrainingInputs, forward: Forward
) -> tuple[RewardFunction, ScoreTokens | None]:
    """Return the function that gives the rewards of responses, and the task's gold reward, None without a task.

    A collective. Raises ConfigError if the reward can't be loaded.
    """
    encoder, evals = inputs.encoder, config.evals
    task = config.data.task if config.data.uses_task else None
    if task is not None:
        prompts = [encoder.prompt(text) for text in task.prompts(HELD_OUT, evals.num_prompts, config.seed)]
    else:
        prompts = distinct_prompts(inputs.held_out)[: evals.num_prompts]
    needs = RewardInputs(
        encoder=encoder,
        task=task,
        judge=evals.judge,
        initial=inputs.initial,
        prompts=prompts,
        max_new_tokens=evals.max_new_tokens,
        seed=derive_seed(config.seed, "evaluation/initial"),
        device=forward.device,
        context=forward.context,
        tokens=config.data.forward_tokens,
    )
    try:
        return config.reward.prepare(needs), needs.gold
    except (RewardError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _overrides(settings: RunConfig) -> list[str]:
    """Return the overrides with which dpo_lab.reward trains the same reward model, from those of this command."""
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    assert isinstance(settings.reward, Learned)
    own = {
        "trainer.max_steps": settings.trainer["max_steps"],
        "data.batch_size": settings.data.batch_size,
        "optim.lr": settings.optim.lr,
        "reward.centring": settings.reward.centring,
        "evals.num_prompts": settings.evals.num_prompts,
    }
    kept = [each for each in typed if override_key(each).partition("@")[0] not in own]
    kept = [each for each in kept if override_key(each).partition("@")[0].partition(".")[0] in KEPT]
    return kept + [f"{key}={value}" for key, value in own.items()]
