"""RLOO: REINFORCE on whole responses, whose baseline is the mean of the other responses to the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.core.methods.base import PolicyGradient, clipped


@dataclass
class RLOO(PolicyGradient, name="rloo"):
    """REINFORCE leave-one-out: the reward of a response is r - beta log(pi / ref), its baseline the mean of the other K - 1.

    Ahmadian et al. 2024 (arXiv:2402.14740), equations 4 and 8. The ratio that is clipped is that of whole responses.
    """

    def advantages(self, rollouts):
        from dpo_lab.core.advantages import leave_one_out
        from dpo_lab.core.logps import sum_responses
        from dpo_lab.core.rollouts import spread

        log_ratios = sum_responses(rollouts.log_ratios, rollouts.lengths)
        return spread(leave_one_out(rollouts.rewards - rollouts.beta * log_ratios), rollouts.response_lengths), None

    def log_ratios(self, logps, rollouts):
        from dpo_lab.core.logps import sum_responses
        from dpo_lab.core.rollouts import spread

        return spread(sum_responses(logps - rollouts.behaviour, rollouts.lengths), rollouts.response_lengths)

    def token_weights(self, lengths, longest):
        return 1 / lengths  # a response's tokens all have its ratio and its advantage: their mean is its loss

    def loss(self, logps, rollouts):
        return -clipped(self.log_ratios(logps, rollouts), rollouts.advantages, self.clip) * rollouts.weights
