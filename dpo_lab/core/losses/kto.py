"""KTO: each response valued against the policy's drift from the reference, which mismatched responses of the step estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, StepLevel
from dpo_lab.core.pairs import PairLogps
from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class KTO(
    StepLevel,
    Loss,
    name="kto",
    requires_reference=True,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
    takes_unpaired=True,
    needs_unrelated=True,
):
    """Kahneman-Tversky optimization, lambda_D [1 - sigma(beta (r(w) - z))] + lambda_U [1 - sigma(beta (z - r(l)))]: z is the
    step's mean of r(y') over responses y' to other prompts, at least 0, and no gradient flows through it.

    Ethayarajh et al. 2024 (arXiv:2402.01306), equations 7 and 8. r are the log-ratios, lambda_D desirable_weight, lambda_U
    undesirable_weight; the paper takes them so that both labels weigh alike. A response labelled on its own has its own term
    alone. At the start the loss of a pair is (lambda_D + lambda_U) / 2. y' of a pair is fixed, see PairTable.with_unrelated,
    where TRL's is another response of the same micro-batch. z stays a KL divergence whatever `divergence` is.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.desirable_weight", self.desirable_weight, 0, 1)
        check_at_least("loss.undesirable_weight", self.undesirable_weight, 0, 1)

    def baseline(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, ""]:
        """Return z, without gradient; 0 where mismatched responses were not scored, as before the first step."""
        if policy.unrelated is None or reference.unrelated is None:
            return policy.chosen.new_zeros(())
        return (policy.unrelated - reference.unrelated).mean().clamp(min=0).detach()

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, " pairs"]:
        r, z = self.scores(policy, reference), self.baseline(policy, reference)
        desirable = (-self.beta * (r.chosen - z)).sigmoid() * (r.chosen_length > 0)
        undesirable = (-self.beta * (z - r.rejected)).sigmoid() * (r.rejected_length > 0)
        return self.desirable_weight * desirable + self.undesirable_weight * undesirable
