"""Fine-tuning on pairs without a comparison: on chosen responses alone, and with unlikelihood of rejected ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class SFTChosen(
    Loss, name="sft", requires_reference=False, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """-log pi(w), in nats per response: supervised fine-tuning on the chosen responses, the baseline "Preferred-FT" of
    Rafailov et al. 2023 (arXiv:2305.18290), section 6.

    Requires reference=uniform. The loss does not depend on beta, which only scales the logged rewards. It is summed
    over tokens, so that every token of a step has the same weight.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        return -policy.chosen


@dataclass
class Unlikelihood(
    Loss,
    name="unlikelihood",
    requires_reference=False,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
):
    """-log pi(w) + alpha log pi(l), in nats: the baseline "Unlikelihood" of Rafailov et al. 2023 (arXiv:2305.18290),
    section 6, after Welleck et al. 2019 (arXiv:1908.04319), whose penalty is -log(1 - p) per token.

    Requires reference=uniform. The loss does not depend on beta, which only scales the logged rewards. alpha=0 is
    SFTChosen; for alpha above 0 the loss has no minimum: the rejected responses can always become less likely.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"loss.alpha={self.alpha}: must lie in [0, 1]; type e.g. loss.alpha=0.5")

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        return self.alpha * policy.rejected - policy.chosen
