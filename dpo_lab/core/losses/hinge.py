"""The hinge loss of SLiC-HF on log-ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class Hinge(
    Loss, name="hinge", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True
):
    """max(0, 1 - beta h). SLiC-HF's calibration loss on log-ratios; Zhao et al. 2023 (arXiv:2305.10425), equation 2."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return (1 - self.beta * h).relu()
