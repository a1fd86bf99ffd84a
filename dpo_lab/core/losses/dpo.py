"""DPO, and its variants for noisy labels: conservative DPO (label smoothing) and robust DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, log_sigmoid
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class DPO(Loss, name="dpo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    """-log sigma(beta h). Rafailov et al. 2023 (arXiv:2305.18290), equation 7."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return -log_sigmoid(self.beta * h)


@dataclass
class CDPO(Loss, name="cdpo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    """Conservative DPO (label smoothing): -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).

    Mitchell 2023, "A note on DPO with noisy preferences", equation 5. eps: label_smoothing, the assumed share of wrong
    labels; at 1/2 the loss is symmetric in chosen and rejected.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}: must lie in [0, 0.5]; type e.g. loss.label_smoothing=0.1"
            )

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        eps = self.label_smoothing
        return -(1 - eps) * log_sigmoid(self.beta * h) - eps * log_sigmoid(-self.beta * h)


@dataclass
class RDPO(Loss, name="rdpo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    """Robust DPO: [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps), l(h) = -log sigma(beta h), eps = flip_rate.

    Chowdhury et al. 2024 (arXiv:2403.00409), equation 12. An unbiased estimate of the loss on clean labels if labels
    are flipped at rate eps. May be negative. For label smoothing see CDPO.
    """

    flip_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(
                f"loss.flip_rate={self.flip_rate}: must lie in [0, 0.5), at 0.5 labels say nothing;"
                " type e.g. loss.flip_rate=0.1"
            )

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        eps = self.flip_rate
        as_labelled, as_flipped = -log_sigmoid(self.beta * h), -log_sigmoid(-self.beta * h)
        return ((1 - eps) * as_labelled - eps * as_flipped) / (1 - 2 * eps)
