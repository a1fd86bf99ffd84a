"""DPO with a further term: the likelihood of chosen responses (RPO), a penalty where it falls (DPOP), a KL penalty."""

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
class RPO(Loss, name="rpo", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=False):
    """RPO, -log sigma(beta h) - alpha log pi(w) / |w|: DPO plus alpha times the mean negative log-likelihood per token
    of the chosen response, in nats.

    Pang et al. 2024 (arXiv:2404.19733), equation 1; Liu et al. 2024 (arXiv:2405.16436) derive the term as a guard
    against over-optimisation. At a margin of 0 the loss is ln 2 plus alpha times that negative log-likelihood.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        h = self.scores(policy, reference).margin
        return -log_sigmoid(self.beta * h) - self.alpha * policy.per_token().chosen


@dataclass
class DPOP(Loss, name="dpop", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=False):
    """DPO-Positive, -log sigma(beta (h - lambda max(0, (log ref - log pi)(w)))): where a chosen response is less likely
    than under the reference, lambda times the difference is subtracted from the margin. Pal et al. 2024
    (arXiv:2402.13228), equation 3.

    penalty: lambda. Margins and rewards are logged without the penalty, as for DPO. At the start the loss is ln 2.
    """

    penalty: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.penalty", self.penalty, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        ratios = self.scores(policy, reference)
        return -log_sigmoid(self.beta * (ratios.margin - self.penalty * (-ratios.chosen).relu()))


@dataclass
class DPOKL(
    Loss, name="dpo_kl", requires_reference=True, is_bradley_terry=True, is_per_token=False, is_margin_only=False
):
    """-log sigma(beta h) + kl_weight (r(w)^2 + r(l)^2) / 4, r = log pi - log ref: DPO with an explicit KL penalty.

    r^2 / 2 is Schulman's k2 ("Approximating KL divergence", 2020), here averaged over the two responses of a pair. If
    the responses are samples of the reference, as the pairs of a task are, E[r^2 / 2] over both of them is KL(ref ||
    pi) - E[r^3] / 6 + ... and KL(pi || ref) - E[r^3] / 3 + ...: an approximation to second order, exact near the start
    and less so far from it. It misses probability that the policy moves to responses that are in no pair. On pairs from
    another source it is a regulariser towards the reference, not an estimate of a KL divergence.

    Why k2: it is never negative and pulls every r towards 0. -r, unbiased for KL(ref || pi), would increase both
    log-probabilities without bound, and estimators that are unbiased for KL(pi || ref) have weights e^r.
    Requires a reference that equals the initial policy. At the start the loss is ln 2.
    """

    kl_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.kl_weight", self.kl_weight, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r, h = self.log_ratios(policy, reference), self.scores(policy, reference).margin
        kl = (r.chosen.square() + r.rejected.square()) / 4
        return -log_sigmoid(self.beta * h) + self.kl_weight * kl
