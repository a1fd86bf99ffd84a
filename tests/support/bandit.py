"""An enumerable task: prompts with a table of responses of one token each, known rewards, and a policy that is a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from dpo_lab.core.methods import PolicyGradient
from dpo_lab.core.rollouts import Rollouts, spread


@dataclass
class Bandit:
    """rewards, reference: of each response to each prompt [Q, N]; reference is a table of log-probabilities."""

    rewards: Tensor
    reference: Tensor

    @classmethod
    def random(cls, prompts: int, responses: int, seed: int = 0) -> Bandit:
        generator = torch.Generator().manual_seed(seed)
        rewards, logits = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
        return cls(rewards / 2, logits.log_softmax(1))

    def optimum(self, beta: float) -> Tensor:
        """reference x exp(reward / beta) / Z."""
        return (self.reference + self.rewards / beta).softmax(1)

    def forward_kl_optimum(self, beta: float) -> Tensor:
        """The maximum of E[r] - beta KL(reference || pi): beta reference / (lambda - r), by bisection over lambda."""
        reference = self.reference.exp()
        low, high = self.rewards.amax(1, keepdim=True), self.rewards.amax(1, keepdim=True) + beta
        for _ in range(200):
            middle = (low + high) / 2
            above = (beta * reference / (middle - self.rewards)).sum(1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return beta * reference / (high - self.rewards)

    def objective(self, logits: Tensor, beta: float) -> Tensor:
        """E[r] - beta KL(pi || reference), summed over prompts."""
        logps = logits.log_softmax(1)
        return (logps.exp() * (self.rewards - beta * (logps - self.reference))).sum()

    def rollouts(self, logits: Tensor, prompts: Tensor, responses: Tensor, beta: float) -> Rollouts:
        """The rollouts of given responses [P, K] to given prompts [P], with the values of an exact critic."""
        logps = logits.detach().log_softmax(1)
        behaviour, reference = (table[prompts[:, None], responses] for table in (logps, self.reference))
        rewards = self.rewards[prompts[:, None], responses]
        values = (logps.exp() * (self.rewards - beta * (logps - self.reference))).sum(1)[prompts]
        lengths = np.ones((len(prompts), 1 + responses.shape[1]), int)
        return Rollouts(
            [str(i) for i in range(len(prompts))],
            torch.cat((prompts[:, None], responses), 1).flatten(),
            lengths,
            rewards,
            rewards,
            torch.ones_like(responses, dtype=torch.bool),
            beta,
            behaviour.flatten(),
            reference.flatten(),
            values=spread(values[:, None].expand(responses.shape), lengths[:, 1:]),
        )

    def loss(self, method: PolicyGradient, logits: Tensor, prompts: Tensor, responses: Tensor) -> Tensor:
        """The losses of a method on given responses, one for each [P, K]."""
        rollouts = self.rollouts(logits, prompts, responses, method.beta)
        advantages, returns = method.advantages(rollouts)
        weights = torch.from_numpy(method.token_weights(rollouts.response_lengths, 1))
        weights = spread(weights, rollouts.response_lengths)
        rollouts = replace(rollouts, advantages=advantages, returns=returns, weights=weights)
        logps = logits.log_softmax(1)[prompts[:, None], responses].flatten()
        return method.loss(logps, rollouts).view(responses.shape)

    def expected_gradient(self, method: PolicyGradient, logits: Tensor, samples: int) -> Tensor:
        """The mean of the gradient of a method's loss over all groups of `samples` responses, by enumeration [Q, N]."""
        count, responses = self.rewards.shape
        groups = torch.tensor(list(product(range(responses), repeat=samples)))
        prompts = torch.arange(count).repeat_interleave(len(groups))
        groups = groups.repeat(count, 1)
        probability = logits.detach().softmax(1)[prompts[:, None], groups].prod(1)
        logits = logits.detach().requires_grad_()
        loss = (self.loss(method, logits, prompts, groups).mean(1) * probability).sum()
        return torch.autograd.grad(loss, logits)[0]


def total_variation(first: Tensor, second: Tensor) -> float:
    """The largest total variation distance between two tables of distributions, over prompts."""
    return (first - second).abs().sum(1).max().item() / 2
