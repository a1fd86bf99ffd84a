"""PPO: a critic's values, generalised advantages, clipped ratios, and the KL price in the reward of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.core.methods.base import PolicyGradient, clipped

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from dpo_lab.core.rollouts import Rollouts


@dataclass
class PPO(PolicyGradient, name="ppo"):
    """Proximal policy optimization with a critic. Schulman et al. 2017 (arXiv:1707.06347), equations 7 and 9, on rewards of
    Ouyang et al. 2022 (arXiv:2203.02155), equation 2.

    A token's reward is -beta log(pi / ref), and the response's reward is received with its last token. gamma, lam: of
    generalised_advantages; whiten: whether advantages get mean 0 and standard deviation 1 over a rollout;
    critic_lr_factor: the critic's learning rate over the policy's; value_clip: how far, in units of the reward, the critic's
    values may move from those at sampling for gain. kl_target: the KL divergence, in nats a response, that beta is adapted
    to (Ziegler et al. 2019, arXiv:1909.08593, section 2.2), None for a fixed beta; kl_gain: how fast.
    """

    epochs: int = 2
    minibatches: int = 2
    prompts: int = 32
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    critic_lr_factor: float = 3.0
    value_clip: float = 1.0
    kl_target: float | None = None
    kl_gain: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name}={getattr(self, name)}: must lie in [0, 1]; type e.g. method.{name}=1")
        for name in ("critic_lr_factor", "value_clip", "kl_target", "kl_gain"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"method.{name}={value}: must be above 0; type e.g. method.{name}=0.2")

    @property
    def has_critic(self) -> bool:
        return True

    def advantages(self, rollouts):
        import torch

        from dpo_lab.core.advantages import generalised_advantages

        lengths = rollouts.response_lengths.ravel()
        rewards = -rollouts.beta * rollouts.log_ratios
        rewards[torch.from_numpy(lengths.cumsum() - 1)] += rollouts.rewards.flatten()
        advantages, returns = generalised_advantages(rewards, rollouts.values, lengths, self.gamma, self.lam)
        if self.whiten:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return advantages, returns

    def token_weights(self, lengths, longest):
        return np.full(lengths.shape, 1 / lengths.mean())

    def loss(self, logps, rollouts):
        return -clipped(self.log_ratios(logps, rollouts), rollouts.advantages, self.clip) * rollouts.weights

    def value_loss(
        self, values: Float[Tensor, " response_tokens"], rollouts: Rollouts
    ) -> Float[Tensor, " response_tokens"]:
        """Return half the squared error of the critic's values, clipped as the ratios are, in units as those of `loss`."""
        near = rollouts.values + (values - rollouts.values).clamp(-self.value_clip, self.value_clip)
        errors = [(each - rollouts.returns).square() for each in (values, near)]
        return errors[0].maximum(errors[1]) / 2 * rollouts.weights

    def next_beta(self, beta, kl):
        if self.kl_target is None:
            return beta
        return beta * (1 + self.kl_gain * min(max(kl / self.kl_target - 1, -0.2), 0.2))
