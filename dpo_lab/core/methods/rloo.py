"""RLOO: REINFORCE on whole responses, whose baseline is the mean of the other responses to the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_lab.core.methods.base import PolicyGradient, clipped


@dataclass
class RLOO(PolicyGradient, name="rloo"):
    """REINFORCE leave-one-out: the reward of a response is r - beta log(pi / ref), its baseline the mean of the other K - 1.

    Ahmadian et al. 2024 (arXiv:2402.14740), equations 4 and 8. The ratio that is clipped is that of whole responses.
    """

    def advantages(self, rollouts, beta):
        from dpo_lab.core.advantages import leave_one_out
        from dpo_lab.core.logps import sum_responses
        from dpo_lab.core.rollouts import spread

        log_ratios = sum_responses(rollouts.behaviour - rollouts.reference, rollouts.lengths)
        return spread(leave_one_out(rollouts.rewards - beta * log_ratios), rollouts.response_lengths), None

    def token_weights(self, lengths, longest):
        return np.ones(lengths.shape)  # a response's loss is one number

    def loss(self, logps, rollouts, beta):
        from dpo_lab.core.logps import sum_responses

        log_ratios = sum_responses(logps - rollouts.behaviour, rollouts.lengths)
        advantages = sum_responses(rollouts.advantages, rollouts.lengths) / log_ratios.new_tensor(
            rollouts.response_lengths
        )
        return -clipped(log_ratios, advantages, self.clip)
