"""Losses without a reference that keep a likelihood term in its place: CPO, ORPO, SLiC-HF."""

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
class CPO(Loss, name="cpo", requires_reference=False, is_bradley_terry=True, is_per_token=False, is_margin_only=False):
    """Contrastive preference optimization, -log sigma(beta h) - alpha log pi(w), in nats; h is the policy's own margin.

    Xu et al. 2024 (arXiv:2401.08417), equations 5 and 6, whose alpha is 1. The likelihood is summed over tokens, as in
    the paper; TRL takes its mean. Requires reference=uniform.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return -log_sigmoid(self.beta * h) - self.alpha * policy.chosen


@dataclass
class ORPO(
    Loss, name="orpo", requires_reference=False, is_bradley_terry=False, is_per_token=True, is_margin_only=False
):
    """Odds ratio preference optimization, -m(w) - beta log sigma(odds(w) - odds(l)): m is a response's mean log-probability
    a token, odds its log odds m - log(1 - exp m).

    Hong et al. 2024 (arXiv:2403.07691), equations 4 to 7; beta is its lambda. Requires reference=uniform.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        m = policy.per_token()
        odds = log_odds(m.chosen) - log_odds(m.rejected)
        return -m.chosen - self.beta * log_sigmoid(odds)


@dataclass
class SLiC(
    Loss, name="slic", requires_reference=False, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """SLiC-HF, max(0, delta - h) - alpha log pi(w), in nats: h is the policy's own margin, beta is 1 / delta.

    Zhao et al. 2023 (arXiv:2305.10425), equations 1 and 2, with the chosen response as the target of the likelihood; divided
    by delta its first term is `hinge` with reference=uniform. Requires reference=uniform.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 0.1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return (1 / self.beta - h).relu() - self.alpha * policy.chosen


def log_odds(logps: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Return log(p / (1 - p)) of log-probabilities; a probability that rounds to 1 is taken as the largest below it."""
    import torch

    below = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below - (-below.expm1()).log()
