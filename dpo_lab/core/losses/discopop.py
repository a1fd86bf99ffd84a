"""DiscoPOP: a loss found by a search that a language model led."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, log_sigmoid
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class DiscoPOP(
    Loss, name="discopop", requires_reference=None, is_bradley_terry=False, is_per_token=False, is_margin_only=True
):
    """Log-ratio modulated loss, with x = beta h and m = sigma(x / tau): -(1 - m) log sigma(x) + m exp(-x).

    Lu et al. 2024 (arXiv:2406.08414), equation 5: logistic for pairs that are rated wrong, exponential for those rated
    right. It is not convex, and has a small maximum beside 0. At the start the loss is (ln 2 + 1) / 2.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"loss.tau={self.tau}: must lie in (0, 1]; type e.g. loss.tau=0.05")

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        x = self.beta * self.scores(policy, reference).margin
        logistic = -(-x / self.tau).sigmoid() * log_sigmoid(x)
        return logistic + (log_sigmoid(x / self.tau) - x).exp()  # in the exponent, where exp(-x) alone would overflow
