"""The losses: one small dataclass each, which is both its config schema and its formula, all in one table.

A loss takes the `PairLogps` of policy and reference and returns one loss per pair, [B]. In formulas h is the log-ratio
margin (log pi - log ref)(chosen) - (log pi - log ref)(rejected), w chosen, l rejected, and sigma the logistic function.

This module does not import torch when it is imported, so that a config is checked without loading torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_lab.core.pairs import PairLogps


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log sigma(x); value and gradient are finite at any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


@dataclass
class Loss:
    """The base class of losses. beta: strength of the regularisation towards the reference, in units of the loss.

    wants_reference: True if the loss requires a reference that equals the initial policy, False if it requires
    reference=uniform, None if it takes any. rates_pairs: whether sigma(beta h) is the loss's probability of a label, as
    under the model of Bradley and Terry.
    """

    wants_reference: ClassVar[bool | None] = None
    rates_pairs: ClassVar[bool] = True
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta}: must be a positive number; type e.g. beta=0.1")

    def log_ratios(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        """Return the log-ratios that the loss compares; rewards are beta times these."""
        return policy - reference

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Return the loss of each pair, [B]."""
        raise NotImplementedError


class PerToken(Loss):
    """A loss whose log-ratios are means over tokens instead of sums."""

    def log_ratios(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        return (policy - reference).per_token()


@dataclass
class DPO(Loss):
    """-log sigma(beta h). Rafailov et al. 2023 (arXiv:2305.18290), equation 7."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return -log_sigmoid(self.beta * h)


@dataclass
class CDPO(Loss):
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

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        eps = self.label_smoothing
        return -(1 - eps) * log_sigmoid(self.beta * h) - eps * log_sigmoid(-self.beta * h)


@dataclass
class RDPO(Loss):
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

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        eps = self.flip_rate
        as_labelled, as_flipped = -log_sigmoid(self.beta * h), -log_sigmoid(-self.beta * h)
        return ((1 - eps) * as_labelled - eps * as_flipped) / (1 - 2 * eps)


@dataclass
class IPOSum(Loss):
    """IPO on summed log-ratios, (h - 1 / (2 beta))^2. Azar et al. 2023 (arXiv:2310.12036), equation 17; beta is its
    tau.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return (h - 1 / (2 * self.beta)).square()


@dataclass
class IPOMean(PerToken):
    """IPO on per-token log-ratios, (h - 1 / (2 beta))^2, as TRL and LLaMA-Factory implement it."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return (h - 1 / (2 * self.beta)).square()


@dataclass
class Hinge(Loss):
    """max(0, 1 - beta h). SLiC-HF's calibration loss on log-ratios; Zhao et al. 2023 (arXiv:2305.10425), equation 2."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return (1 - self.beta * h).relu()


@dataclass
class SimPO(PerToken):
    """SimPO, -log sigma(beta h - gamma) on per-token log-probabilities without a reference: h is the policy's own
    margin.

    Meng et al. 2024 (arXiv:2405.14734), equation 6. gamma is the target margin in units of the reward (beta times a
    mean log-probability); some implementations set gamma / beta instead. Requires reference=uniform.
    """

    wants_reference: ClassVar[bool | None] = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.gamma", self.gamma, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return -log_sigmoid(self.beta * h - self.gamma)


@dataclass
class SFTChosen(Loss):
    """-log pi(w), in nats per response: supervised fine-tuning on the chosen responses, the baseline "Preferred-FT" of
    Rafailov et al. 2023 (arXiv:2305.18290), section 6.

    Requires reference=uniform. The loss does not depend on beta, which only scales the logged rewards. It is summed
    over tokens, so that every token of a step has the same weight.
    """

    wants_reference: ClassVar[bool | None] = False
    rates_pairs: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return -policy.chosen


@dataclass
class Unlikelihood(Loss):
    """-log pi(w) + alpha log pi(l), in nats: the baseline "Unlikelihood" of Rafailov et al. 2023 (arXiv:2305.18290),
    section 6, after Welleck et al. 2019 (arXiv:1908.04319), whose penalty is -log(1 - p) per token.

    Requires reference=uniform. The loss does not depend on beta, which only scales the logged rewards. alpha=0 is
    SFTChosen; for alpha above 0 the loss has no minimum: the rejected responses can always become less likely.
    """

    wants_reference: ClassVar[bool | None] = False
    rates_pairs: ClassVar[bool] = False
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"loss.alpha={self.alpha}: must lie in [0, 1]; type e.g. loss.alpha=0.5")

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return self.alpha * policy.rejected - policy.chosen


@dataclass
class RPO(Loss):
    """RPO, -log sigma(beta h) - alpha log pi(w) / |w|: DPO plus alpha times the mean negative log-likelihood per token
    of the chosen response, in nats.

    Pang et al. 2024 (arXiv:2404.19733), equation 1; Liu et al. 2024 (arXiv:2405.16436) derive the term as a guard
    against over-optimisation. At a margin of 0 the loss is ln 2 plus alpha times that negative log-likelihood.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return -log_sigmoid(self.beta * h) - self.alpha * policy.per_token().chosen


@dataclass
class DPOP(Loss):
    """DPO-Positive, -log sigma(beta (h - lambda max(0, (log ref - log pi)(w)))): where a chosen response is less likely
    than under the reference, lambda times the difference is subtracted from the margin. Pal et al. 2024
    (arXiv:2402.13228), equation 3.

    penalty: lambda. Margins and rewards are logged without the penalty, as for DPO. At the start the loss is ln 2.
    """

    penalty: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.penalty", self.penalty, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        ratios = self.log_ratios(policy, reference)
        return -log_sigmoid(self.beta * (ratios.margin - self.penalty * (-ratios.chosen).relu()))


@dataclass
class DPOKL(Loss):
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

    wants_reference: ClassVar[bool | None] = True
    kl_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.kl_weight", self.kl_weight, 0, 1)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        r = self.log_ratios(policy, reference)
        kl = (r.chosen.square() + r.rejected.square()) / 4
        return -log_sigmoid(self.beta * r.margin) + self.kl_weight * kl


LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "cdpo": CDPO,
    "rdpo": RDPO,
    "ipo": IPOSum,
    "ipo_mean": IPOMean,
    "hinge": Hinge,
    "simpo": SimPO,
    "sft": SFTChosen,
    "unlikelihood": Unlikelihood,
    "rpo": RPO,
    "dpop": DPOP,
    "dpo_kl": DPOKL,
}
