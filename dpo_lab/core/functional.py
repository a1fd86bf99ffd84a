"""The textbook DPO loss on four tensors, for a notebook; needs neither Hydra nor Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_lab.core.losses.dpo import DPO
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Float[Tensor, " pairs"],
    policy_rejected_logps: Float[Tensor, " pairs"],
    ref_chosen_logps: Float[Tensor, " pairs"],
    ref_rejected_logps: Float[Tensor, " pairs"],
    beta: float = 0.1,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return the DPO loss, averaged over pairs, and its metrics.

    The four tensors hold log-probabilities summed over a response's tokens, in nats. Metrics: `loss`;
    `chosen_rewards` and `rejected_rewards`, mean log-ratios to the reference without beta; `reward_margin`, their
    difference times beta; `accuracy`, the share of pairs with a positive margin, where a tie counts half.
    """
    from dpo_lab.core.metrics import LABELLED, pair_values

    lengths = policy_chosen_logps.new_ones(policy_chosen_logps.shape)
    policy = PairLogps(policy_chosen_logps, policy_rejected_logps, lengths, lengths)
    reference = PairLogps(ref_chosen_logps, ref_rejected_logps, lengths, lengths)
    loss = DPO(beta)
    losses = loss(policy, reference)
    means = pair_values(loss, losses.detach(), policy.detach(), reference.detach()).mean(0).tolist()
    value = dict(zip(LABELLED, means, strict=True))
    metrics = {
        "loss": value["loss"],
        "chosen_rewards": value["logratio/chosen"],
        "rejected_rewards": value["logratio/rejected"],
        "reward_margin": value["rewards/margins"],
        "accuracy": value["rewards/accuracies"],
    }
    return losses.mean(), metrics
