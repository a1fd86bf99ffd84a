"""IPO: a squared loss that aims at a finite margin, on summed and on per-token log-ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class IPOSum(Loss, name="ipo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    """IPO on summed log-ratios, (h - 1 / (2 beta))^2. Azar et al. 2023 (arXiv:2310.12036), equation 17; beta is its
    tau.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return (h - 1 / (2 * self.beta)).square()


@dataclass
class IPOMean(
    Loss, name="ipo_mean", requires_reference=None, is_bradley_terry=True, is_per_token=True, is_margin_only=True
):
    """IPO on per-token log-ratios, (h - 1 / (2 beta))^2, as TRL and LLaMA-Factory implement it."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return (h - 1 / (2 * self.beta)).square()
