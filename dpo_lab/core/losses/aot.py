"""AOT: optimal transport between the step's distributions of log-ratios instead of a comparison of each pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Divergence, Loss, StepLevel, log_sigmoid
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class AOT(
    StepLevel,
    Loss,
    name="aot",
    requires_reference=None,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
):
    """Alignment via optimal transport, paired: -log sigma(beta (m - n)) of the step's margins log pi(w) - log pi(l), sorted, m,
    and of those under the reference, sorted on their own, n.

    Melnyk et al. 2024 (arXiv:2406.05882), equation 10. At the start the loss is ln 2. It takes no other divergence.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is not Divergence.reverse_kl:
            raise ValueError(
                f"loss.divergence={self.divergence.value}: aot sorts policy and reference apart, without their ratios; type"
                " loss.divergence=reverse_kl, or loss=aot_unpaired"
            )

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, " pairs"]:
        order = policy.margin.argsort()
        margins = policy.margin[order] - reference.margin.sort().values
        return -log_sigmoid(self.beta * margins)[order.argsort()]


@dataclass
class AOTUnpaired(
    StepLevel,
    Loss,
    name="aot_unpaired",
    requires_reference=None,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
):
    """Alignment via optimal transport, unpaired: -log sigma(beta (u - v)) of the step's scores of chosen responses, sorted, u,
    and of rejected ones, sorted on their own, v. Which chosen response belongs to which rejected one does not matter.

    Melnyk et al. 2024 (arXiv:2406.05882), equation 11. At the start the loss is ln 2.
    """

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, " pairs"]:
        scores = self.scores(policy, reference)
        order = scores.chosen.argsort()
        margins = scores.chosen[order] - scores.rejected.sort().values
        return -log_sigmoid(self.beta * margins)[order.argsort()]
