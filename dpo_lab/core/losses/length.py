"""DPO with the length of responses taken out: by a mean over tokens, or by a penalty."""

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
class DPOMean(
    Loss, name="dpo_mean", requires_reference=None, is_bradley_terry=True, is_per_token=True, is_margin_only=True
):
    """DPO on per-token log-ratios, -log sigma(beta h) with h the difference of means over tokens.

    Length-normalised DPO: Meng et al. 2024 (arXiv:2405.14734), section 4.2, whose beta is 2 and above; TRL's
    sigmoid_norm. At the start the loss is ln 2.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return -log_sigmoid(self.beta * h)


@dataclass
class DPOLength(
    Loss, name="dpo_length", requires_reference=None, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """Length-regularised DPO (R-DPO), -log sigma(beta h + alpha (|w| - |l|)), lengths in tokens.

    Park et al. 2024 (arXiv:2403.19159), equation 9: the reward to learn is less alpha a token, so a pair whose chosen
    response is longer needs a smaller margin. Not the robust DPO of the name rdpo.
    """

    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 0.01)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        longer = policy.chosen_length - policy.rejected_length
        return -log_sigmoid(self.beta * h + self.alpha * longer)
