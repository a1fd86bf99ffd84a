"""GRPO: advantages relative to the group of responses to a prompt, clipped ratios of tokens, the KL price in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from dpo_lab.core.methods.base import PolicyGradient, clipped


class Scale(str, Enum):
    """What a group's centred rewards are divided by."""

    group = "group"  # their standard deviation
    none = "none"


class Normalise(str, Enum):
    """What the sum of a response's token losses is divided by."""

    sequence = "sequence"  # its own length
    token = "token"  # the mean length of the optimizer step's responses
    constant = "constant"  # the length limit of sampling


class KLPrice(str, Enum):
    """Where the KL divergence from the reference is paid."""

    k3 = "k3"  # in the loss, by the estimator k3: its gradient is that of KL(ref || pi)
    k3_weighted = "k3_weighted"  # k3 times the token's ratio (arXiv:2512.02556): its gradient is that of KL(pi || ref)
    k2 = "k2"  # in the loss, by log(pi / ref)^2 / 2: its gradient is that of KL(pi || ref), token by token
    reward = "reward"  # in the reward, as RLOO does


@dataclass
class GRPO(PolicyGradient, name="grpo"):
    """Group relative policy optimization. Shao et al. 2024 (arXiv:2402.03300), equation 3 with the advantages of section
    4.1.2; scale=none with normalise=constant is Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).

    With K responses a prompt and scale=none the optimum is reference x exp(reward / beta) / Z with kl=reward, the same for
    beta K / (K - 1) with kl=k2 or k3_weighted (exact for single tokens), and beta K / (K - 1) reference / (lambda - reward)
    with kl=k3, where lambda makes it sum to 1. scale=group divides the rewards of each prompt by their own spread, which
    changes them all.
    """

    scale: Scale = Scale.group
    normalise: Normalise = Normalise.sequence
    kl: KLPrice = KLPrice.k3

    def advantages(self, rollouts):
        from dpo_lab.core.advantages import group_centred
        from dpo_lab.core.logps import sum_responses
        from dpo_lab.core.rollouts import spread

        rewards = rollouts.rewards
        if self.kl is KLPrice.reward:
            rewards = rewards - rollouts.beta * sum_responses(rollouts.log_ratios, rollouts.lengths)
        centred = group_centred(rewards, divides=self.scale is Scale.group)
        return spread(centred, rollouts.response_lengths), None

    def token_weights(self, lengths, longest):
        if self.normalise is Normalise.sequence:
            return 1 / lengths
        return np.full(lengths.shape, 1 / (lengths.mean() if self.normalise is Normalise.token else longest))

    def loss(self, logps, rollouts):
        from dpo_lab.core.advantages import k2, k3

        moved = self.log_ratios(logps, rollouts)
        losses = -clipped(moved, rollouts.advantages, self.clip)
        if self.kl is not KLPrice.reward:
            price = (k2 if self.kl is KLPrice.k2 else k3)((logps - rollouts.reference).clamp(-40, 40))
            if self.kl is KLPrice.k3_weighted:
                price = price * moved.clamp(max=40).exp()
            losses = losses + rollouts.beta * price
        return losses * rollouts.weights
