"""The LightningModule of reward models: Bradley and Terry's loss on the rewards of both responses of a pair."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.bradley_terry import RewardMetrics, reward_losses
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.reward_head import dummy_reward, response_rewards
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.dpo_module import CHARTS
from dpo_lab.training.optim import Optim


class RewardModule(BaseModule):
    """Trains a reward model, see models/reward_head.py; the loss is averaged over the `batch_size` pairs that a step has
    on all ranks. centring: see reward_losses.
    """

    title = "Reward model"
    charts = {name: scalars for name, scalars in CHARTS.items() if not name.startswith("logps")}

    def __init__(
        self,
        model: PreTrainedModel,
        optim: Optim,
        centring: float = 0.0,
        *,
        total_steps: int,
        batch_size: int,
        tokens_per_microbatch: int,
    ) -> None:
        sizes = dict(total_steps=total_steps, tokens_per_microbatch=tokens_per_microbatch)
        super().__init__(model, optim, RewardMetrics, **sizes)
        self.centring, self.batch_size = centring, batch_size

    def normalizer(self, batch: PairBatch) -> int:
        return self.batch_size

    def dummy_loss(self) -> Tensor:
        return 0 * dummy_reward(self.model).sum()

    def part_loss(self, part: PairBatch) -> Tensor:
        rewards = response_rewards(self.model, part.tokens, part.lengths)
        losses = reward_losses(rewards, self.centring)
        self.train_metrics.update(losses, rewards, part)
        return losses.sum()

    def validate_part(self, part: PairBatch) -> None:
        rewards = response_rewards(self.model, part.tokens, part.lengths)
        self.val_metrics.update(reward_losses(rewards, self.centring), rewards, part)
