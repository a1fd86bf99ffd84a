"""SimPO: a loss of per-token log-probabilities with a target margin, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, log_sigmoid
from dpo_lab.core.pairs import PairLogps
from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class SimPO(
    Loss, name="simpo", requires_reference=False, is_bradley_terry=True, is_per_token=True, is_margin_only=True
):
    """SimPO, -log sigma(beta h - gamma) on per-token log-probabilities without a reference: h is the policy's own
    margin.

    Meng et al. 2024 (arXiv:2405.14734), equation 6. gamma is the target margin in units of the reward (beta times a
    mean log-probability); some implementations set gamma / beta instead. Requires reference=uniform.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.gamma", self.gamma, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return -log_sigmoid(self.beta * h - self.gamma)
