"""The model of Bradley and Terry on scalar rewards: its loss on pairs, and their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_lab.core.losses.base import log_sigmoid
from dpo_lab.core.losses.dpo import DPO
from dpo_lab.core.metrics import PreferenceMetrics
from dpo_lab.core.pairs import PairBatch, PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BRADLEY_TERRY = DPO(beta=1.0)  # on `as_logps`: sigma(margin of the rewards) is the probability of a label


def reward_losses(rewards: Float[Tensor, "pairs 2"], centring: float = 0.0) -> Float[Tensor, " pairs"]:
    """Return -log sigma(r_w - r_l) + centring (r_w + r_l)^2 of each pair. rewards: of chosen and of rejected.

    Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the second term, which pulls rewards towards mean 0, is that of
    Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    chosen, rejected = rewards.unbind(1)
    losses = -log_sigmoid(chosen - rejected)
    return losses + centring * (chosen + rejected) ** 2 if centring else losses


def as_logps(rewards: Float[Tensor, "pairs 2"], lengths: Int[Tensor, "pairs 2"]) -> tuple[PairLogps, PairLogps]:
    """Return rewards as log-probabilities of a policy, and those of a reference, which are 0: log-ratios are rewards.

    lengths: of both responses, in tokens.
    """
    return PairLogps.of(rewards, lengths), PairLogps.of(torch.zeros_like(rewards), lengths)


class RewardMetrics(PreferenceMetrics):
    """PreferenceMetrics of rewards in place of implicit ones, without metrics of log-probabilities."""

    def update(  # type: ignore[override]
        self, losses: Float[Tensor, " pairs"], rewards: Float[Tensor, "pairs 2"], batch: PairBatch
    ) -> None:
        """Add a batch. rewards: of chosen and of rejected."""
        super().update(BRADLEY_TERRY, losses, *as_logps(rewards, batch.response_lengths), batch)

    def compute(self) -> dict[str, float]:
        return {name: value for name, value in super().compute().items() if "log" not in name.rpartition("/")[0]}
