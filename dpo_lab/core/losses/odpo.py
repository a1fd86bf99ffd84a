"""ODPO: DPO with an offset by how much better the chosen response was scored."""

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
class ODPO(
    Loss,
    name="odpo",
    requires_reference=None,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
    needs_scores=True,
):
    """DPO with an offset, -log sigma(beta h - alpha (s(w) - s(l))), s a response's score: a pair whose scores are further
    apart needs a larger margin.

    Amini et al. 2024 (arXiv:2402.10571), with the difference itself as offset; not with its logarithm, which a pair that
    label noise swapped does not have, since its difference is negative. Scores are gold rewards where the task has them,
    else those that came with the pairs. At the start the loss is -log sigma(-alpha (s(w) - s(l))).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        if reference.score_gap is None:
            raise ValueError("ODPO: the reference's PairLogps has no score_gap, the difference in scores of each pair")
        return -log_sigmoid(self.beta * self.scores(policy, reference).margin - self.alpha * reference.score_gap)
