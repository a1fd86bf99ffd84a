"""Prepare training on responses that the policy samples meanwhile: reward, reference, critic, and the module."""

from __future__ import annotations

import logging
from typing import Any

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.methods import Online, PolicyGradient
from dpo_lab.core.methods.online_dpo import OnlineDPO
from dpo_lab.models.critic import Critic
from dpo_lab.models.limits import Limits
from dpo_lab.models.policy import weights_digest
from dpo_lab.models.reference import reference_model
from dpo_lab.pipelines.inputs import TrainingInputs, policy_errors
from dpo_lab.pipelines.offline import Training, start_training
from dpo_lab.pipelines.reward_inputs import prepare_reward
from dpo_lab.pipelines.session import Session
from dpo_lab.runs.cache import CACHE
from dpo_lab.training.actor import Actor
from dpo_lab.training.online_data import FreshPairs, OnlineDataModule, RolloutData
from dpo_lab.training.policy_gradient_module import PolicyGradientModule
from dpo_lab.training.step_level_module import module_for

log = logging.getLogger("dpo_lab")


def prepare_online(session: Session, inputs: TrainingInputs) -> Training:
    """Prepare reward, reference and critic, and return the module to train and the data module that samples for it.

    The prompts are those of the training pairs.
    """
    config, run, forward, method = session.config, session.run, session.forward, session.config.method
    assert isinstance(method, Online)
    model, memory = start_training(session, inputs)
    held_out, tokens = inputs.held_out.with_responses(), config.data.forward_tokens
    kind = config.reference.of_fresh_responses()
    if kind is not config.reference:
        log.info("reference: %s, since fresh responses are in no cache", type(kind).__name__.lower())
    reference = kind.prepare(model, (), CACHE, forward.context, tokens)
    with policy_errors():
        critic = Critic(model) if method.has_critic else None
    reward, gold = prepare_reward(config, inputs, forward)
    memory.count_weights(model, reference_model(reference), reward.model, critic)
    if reward.model is not None:
        weights = weights_digest(reward.model)  # type: ignore[arg-type]  # a PreTrainedModel
        run.update(reward_model={"weights": weights, "metrics": config.reward.measured()})
    run.update(step_zero_loss=None, seconds=session.timer.stop("reference"))
    prompts = prompts_of(inputs, method, longest := longest_response(config))
    actor = Actor(
        model,
        method,
        reward,
        gold,
        inputs.encoder,
        forward.context,
        longest,
        tokens,
        reference=reference,
        critic=critic,
        batch_size=config.evals.batch_size,
        source=config.reward.name,
    )
    sizes: dict[str, Any] = dict(total_steps=session.trainer.max_steps, tokens_per_microbatch=tokens)
    data: OnlineDataModule
    if isinstance(method, PolicyGradient):
        data = RolloutData(method, actor, prompts, held_out, seed=config.seed)
        module: Any = PolicyGradientModule(
            model,
            config.loss,
            reference,
            config.optim,
            method=method,
            critic=critic,
            **sizes,
        )
    else:
        assert isinstance(method, OnlineDPO)
        data = FreshPairs(method, actor, prompts, held_out, seed=config.seed, loss=config.loss)
        sizes["batch_size"] = method.prompts_per_step
        module = module_for(config.loss)(model, config.loss, reference, config.optim, **sizes)
    asked = reward.queries  # so far, for its scale; each sample is one more, also in earlier attempts of this run
    trajectory_reward = None if config.reward.name == "gold" else reward
    return Training(module, data, memory, lambda: {"rollouts": rollout_costs(data, asked)}, trajectory_reward)


def rollout_costs(data: OnlineDataModule, asked: int) -> dict[str, Any]:
    """Return the entry of the run record: samples drawn, reward queries, and responses that each model ran through it.

    `forward_passes` counts a response once for each pass of training or measuring, without those that draw its tokens, which
    `samples` counts, and a pass of training without its backward pass. asked: reward queries before the first rollout.
    """
    samples, method, actor = data.samples, data.method, data.actor
    assert data.trainer is not None
    trained = data.trainer.global_step * method.prompts_per_step * data.responses
    passes: dict[str, int]
    if isinstance(method, PolicyGradient):
        passes = {"policy": trained + actor.measures_policy * samples, "reference": samples}
    else:
        assert isinstance(data, FreshPairs)
        each = 1 + data.loss.is_step_level + data.loss.needs_unrelated / data.responses  # see StepLevelModule
        passes = dict.fromkeys(("policy", "reference"), round(each * trained))
    if reference_model(actor.reference) is None:
        del passes["reference"]
    if actor.critic is not None:
        passes["critic"] = trained + samples
    if actor.reward_model is not None:
        passes["reward_model"] = samples
    return {"samples": samples, "reward_queries": asked + samples, "forward_passes": passes}


def longest_response(config: RunConfig) -> int:
    """Return the length limit of sampled responses in tokens: the method's, else the task's or that of the evaluation."""
    method = config.method
    assert isinstance(method, Online)
    if method.max_new_tokens is not None:
        return method.max_new_tokens
    return config.data.task.max_new_tokens if config.data.uses_task else config.evals.max_new_tokens


def prompts_of(inputs: TrainingInputs, method: Online, longest: int) -> list[list[int]]:
    """Return the prompts to sample from, those of the training pairs, as often as these have them.

    Raises ConfigError if they are too few, or too long for the model.
    """
    prompts = [list(pair.prompt) for pair in inputs.train]
    if len(prompts) < method.prompts:
        raise ConfigError(
            f"method.prompts={method.prompts}: there are only {len(prompts)} training pairs, whose prompts are sampled from;"
            f" type method.prompts={len(prompts)}"
        )
    with policy_errors():
        Limits.of(inputs.initial.model).check_samples(prompts, longest, "method.max_new_tokens")
    return prompts
