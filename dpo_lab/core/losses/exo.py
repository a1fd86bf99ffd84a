"""EXO: the reverse KL divergence between the policy's preference and smoothed labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, log_sigmoid
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class EXO(Loss, name="exo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    """Efficient exact optimization on pairs, KL(q || p) with q = sigma(beta h) for chosen and p = 1 - eps: q log(q / (1 -
    eps)) + (1 - q) log((1 - q) / eps).

    Ji et al. 2024 (arXiv:2402.00856), equation 16. DPO and its smoothed form minimise the forward divergence KL(p || q).
    eps: label_smoothing; for eps towards 0 the loss of a wrong pair has no bound.
    """

    label_smoothing: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_smoothing <= 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}: must lie in (0, 0.5]; type e.g. loss.label_smoothing=0.001"
            )

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        x = self.beta * self.scores(policy, reference).margin
        eps = self.label_smoothing
        right = x.sigmoid() * (log_sigmoid(x) - math.log1p(-eps))
        return right + (-x).sigmoid() * (log_sigmoid(-x) - math.log(eps))
