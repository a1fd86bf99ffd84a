"""Measure a reward model: on held-out and training pairs, and against the gold reward on samples of the initial policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.bradley_terry import BRADLEY_TERRY, as_logps, reward_losses
from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps
from dpo_lab.evals.context import EvalContext, score_pairs
from dpo_lab.evals.evaluators.calibration import Calibration
from dpo_lab.evals.evaluators.preference import Preference
from dpo_lab.models.reward_head import response_rewards
from dpo_lab.stats.estimates import Estimate, mean, rank_correlation

if TYPE_CHECKING:
    from dpo_lab.models.policy import Policy

LABELS = {
    "true_accuracy": "accuracy, truth (held-out)",
    "accuracy": "accuracy, labels (held-out)",
    "loss": "loss (nats, held-out)",
    "margin": "reward margin (log-odds)",
    "gold_correlation": "rank correlation with gold, pairs",
    "sample_correlation": "rank correlation with gold, samples",
    "sample_slope": "slope against gold / temperature",
    "calibration_error": "calibration error",
    "train/clean/accuracy": "accuracy, clean (train)",
    "train/flipped/accuracy": "accuracy, flipped (train)",
    "reward_mean": "reward of initial samples",
    "reward_sd": "  standard deviation",
}


@dataclass
class RewardContext(EvalContext):
    """A reward model under evaluation, as `trained`; rewards stand for log-ratios to the initial policy."""

    @classmethod
    def of(cls, context: EvalContext, model: Policy) -> RewardContext:
        """Return the context of a reward model on the data of another context."""
        values = {each.name: getattr(context, each.name) for each in dataclasses.fields(context)}
        return cls(**values | {"trained": model, "loss": BRADLEY_TERRY, "reference": None})

    @cached_property
    def sample_rewards(self) -> np.ndarray:
        """Rewards of the initial policy's samples, [N]."""
        responses = [sample.tokens for sample in self.initial_samples]
        rewards, _ = score_pairs(
            self.trained.model, self.prompt_ids, responses, self.tokens, self.context, response_rewards
        )
        return rewards.double().numpy()

    def _logps_of_pairs(self, pairs: Sequence[EncodedPair]) -> tuple[PairLogps, PairLogps]:
        def rewards_of(batch: PairBatch) -> PairLogps:
            rewards = response_rewards(self.trained.model, batch.tokens, batch.lengths)
            return as_logps(rewards, batch.response_lengths)[0]

        rewards = self.logps_of(self.trained.model, rewards_of, pairs)
        return rewards, rewards - rewards


def evaluate_reward_model(context: RewardContext, calibration: Calibration) -> dict[str, Estimate]:
    """Return accuracy, margin, calibration and correlations of a reward model; {} if no pair is held out.

    `sample_correlation` is the rank correlation of rewards with the gold reward on fresh samples of the initial policy,
    `sample_slope` the slope of their regression on gold / temperature, which is 1 for the annotator's own reward;
    `reward_mean` and `reward_sd` are of the same samples. Values per pair are in context.examples afterwards. All ranks
    have to call it, see EvalContext.
    """
    import torch

    if not len(context.pairs):
        return {}
    found = {name: each for evaluator in (Preference(), calibration) for name, each in evaluator.run(context)}
    scored = context.held_out
    losses = reward_losses(torch.stack((scored.trained.chosen, scored.trained.rejected), 1).double())
    return found | {"loss": mean(losses.numpy())} | _of_samples(context)


def _of_samples(context: RewardContext) -> dict[str, Estimate]:
    from scipy import stats

    rewards = context.sample_rewards
    found = {"reward_mean": mean(rewards), "reward_sd": Estimate(float(rewards.std()), n=len(rewards))}
    if context.task is None:
        return found
    gold = np.array([context.task.gold(text) for text in context.complete_texts(context.initial_samples)])
    if (correlation := rank_correlation(rewards.tolist(), gold.tolist())) is not None:
        line: Any = stats.linregress(gold / context.task.temperature, rewards)
        slope = Estimate(float(line.slope), float(line.stderr), len(gold))
        found |= {"sample_correlation": correlation, "sample_slope": slope}
    context.examples.add("prompt", context.prompt_keys, initial_gold=gold, initial_reward=rewards)
    return found
