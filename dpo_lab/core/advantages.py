"""Advantages of sampled responses, and estimators of the KL divergence from their log-ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def leave_one_out(rewards: Float[Tensor, "prompts responses"]) -> Float[Tensor, "prompts responses"]:
    """Return each reward minus the mean of the other rewards of its prompt.

    Ahmadian et al. 2024 (arXiv:2402.14740), equation 8.

    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    [[-3.0, -1.5, 4.5]]
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def group_centred(
    rewards: Float[Tensor, "prompts responses"], divides: bool, eps: float = 1e-4
) -> Float[Tensor, "prompts responses"]:
    """Return each reward minus the mean of its prompt's, divided by their standard deviation plus eps if `divides`.

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; without the division Liu et al. 2025 (arXiv:2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps) if divides else centred


def generalised_advantages(
    rewards: Float[Tensor, " tokens"],
    values: Float[Tensor, " tokens"],
    lengths: Int[np.ndarray, " responses"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return the generalised advantage estimates and the returns (advantage + value) of each token of each response.

    rewards: received for each token; values: of the state before it; the state after the last token has value 0.
    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}. Schulman et al. 2016 (arXiv:1506.02438),
    equation 16.
    """
    columns, width = np.arange(int(lengths.max())), len(lengths)
    real = torch.from_numpy(columns[None] < lengths[:, None])  # [N, T]
    padded_rewards = rewards.new_zeros(real.shape).masked_scatter(real, rewards)
    padded_values = rewards.new_zeros(real.shape).masked_scatter(real, values)
    advantages = torch.zeros_like(padded_rewards)
    advantage = following = rewards.new_zeros(width)
    for t in reversed(columns.tolist()):
        delta = padded_rewards[:, t] + gamma * following - padded_values[:, t]
        advantage = delta + gamma * lam * advantage  # 0 beyond the end of a response, as are reward and value there
        following = padded_values[:, t]
        advantages[:, t] = advantage
    found = advantages[real]
    return found, found + values


def k1(log_ratios: Tensor) -> Tensor:
    """Return log(pi / ref) itself: at samples of pi its mean is KL(pi || ref), with a large variance."""
    return log_ratios


def k2(log_ratios: Tensor) -> Tensor:
    """Return log(pi / ref)^2 / 2: biased, never negative; its gradient's mean at samples of pi is that of KL(pi || ref)."""
    return log_ratios.square() / 2


def k3(log_ratios: Tensor) -> Tensor:
    """Return ref / pi - 1 - log(ref / pi): at samples of pi its mean is KL(pi || ref), and it is never negative.

    As a loss its gradient, which leaves out how samples depend on pi, has the mean of that of KL(ref || pi).
    """
    return (-log_ratios).expm1() + log_ratios
