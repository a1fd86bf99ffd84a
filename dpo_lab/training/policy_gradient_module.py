"""The LightningModule of policy gradients: the loss of rollouts, and the critic's, if the method has one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.core.advantages import k2
from dpo_lab.core.methods.base import PolicyGradient, clipped_share
from dpo_lab.core.methods.ppo import PPO
from dpo_lab.core.metrics import FixedDtypeMetric
from dpo_lab.core.rollouts import Rollouts
from dpo_lab.models.critic import Critic
from dpo_lab.models.forward import rollout_loss
from dpo_lab.models.sharded_weights import full_tensor
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.dpo_module import DPOModule


class PolicyGradientModule(DPOModule):
    """Trains `model` on rollouts by `method`, averaged over the responses that a step has on all ranks.

    critic: a Critic, if the method has one. Held-out pairs are measured as in DPO, with the reward beta log(pi / ref).
    """

    charts = {
        "loss/training": ("train/policy_loss",),
        "loss/held out": ("val/loss",),
        **{title: scalars for title, scalars in DPOModule.charts.items() if "/held out" in title},
    }

    def __init__(self, *args: Any, method: PolicyGradient, critic: Critic | None, **settings: Any) -> None:
        super().__init__(*args, batch_size=method.prompts_per_step * method.samples, **settings)
        self.method, self.critic, self.title = method, critic, method.name.upper()  # type: ignore[misc]
        self.train_metrics: Any = PolicyGradientMetrics()

    def trained_models(self):
        return super().trained_models() + ([] if self.critic is None else [self.critic.model])

    def models(self):
        return super().models() + ([] if self.critic is None else [self.critic.model])

    def dummy_loss(self) -> Tensor:
        """Run the passes of part_loss; those of the reference were run when the rollouts were measured."""
        loss = BaseModule.dummy_loss(self)
        if self.critic is None:
            return loss
        tokens = torch.zeros(2, dtype=torch.long, device=self.device)
        return loss + 0 * self.critic(tokens, np.ones((1, 2), int)).sum()

    def dummy_score(self) -> None:
        super().dummy_loss()

    def part_loss(self, part: Rollouts) -> Tensor:  # type: ignore[override]
        loss, logps = rollout_loss(self.model, part, self.method.loss)
        of_critic, errors = loss.new_zeros(()), None
        if self.critic is not None:
            assert isinstance(self.method, PPO)
            values = self.critic(part.tokens, part.lengths)
            of_critic = self.method.value_loss(values, part).sum()
            errors = (values.detach() - part.returns).square()
        losses = torch.stack((loss.detach(), of_critic.detach()))
        self.train_metrics.update(losses, self.method.log_ratios(logps, part), errors, part, self.method.clip)
        return loss + of_critic

    def clip_gradients_to_norm(self) -> Tensor:
        norm = super().clip_gradients_to_norm()
        return norm if self.critic is None else norm + full_tensor(self.optim.clip(self.critic.parameters()))

    def build_optimizer(self):
        if self.critic is None:
            return super().build_optimizer()
        assert isinstance(self.method, PPO)
        parameters, factor = self.critic.parameters(), self.method.critic_lr_factor
        return self.optim.build(self.model.parameters(), self.total_steps, critic=parameters, critic_factor=factor)


class PolicyGradientMetrics(FixedDtypeMetric):
    """Means over response tokens: how far the policy has moved since sampling, the share of ratios that are clipped, the
    critic's error; and the mean losses of a response, of policy and critic apart. Sums are summed over batches and ranks.
    """

    sums: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, losses: Tensor, log_ratios: Tensor, errors: Tensor | None, part: Rollouts, clip: float) -> None:
        """Add a micro-batch. losses: the sums of those of policy and critic, [2]; log_ratios: see PolicyGradient; errors:
        squared, of the critic.
        """
        is_clipped = clipped_share(log_ratios, part.advantages, clip)
        moved = k2(log_ratios)  # of the policy of now and the one that sampled
        sums = [
            *losses,
            losses.new_tensor(part.rewards.numel()),
            is_clipped.sum(),
            moved.sum(),
            losses.new_tensor(len(log_ratios)),
        ]
        self.sums += torch.stack([each.double() for each in sums])
        if errors is not None:
            returns = part.returns.double()
            self.squares += torch.stack((errors.double().sum(), returns.sum(), returns.square().sum()))

    def compute(self) -> dict[str, float]:
        loss, of_critic, responses, clipped, moved, tokens = self.sums.tolist()
        found = {"policy_loss": loss / responses, "ratio/clipped": clipped / tokens, "ratio/kl": moved / tokens}
        error, total, squares = self.squares.tolist()
        variance = squares / tokens - (total / tokens) ** 2
        if squares:
            found |= {"critic/error": error / tokens, "critic/explained": 1 - error / tokens / max(variance, 1e-12)}
            found["critic/loss"] = of_critic / responses
        return found
