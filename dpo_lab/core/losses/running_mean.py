"""Losses that take a running mean over steps: BCO its shift of rewards, beta-DPO its beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, StepLevel, log_sigmoid
from dpo_lab.core.pairs import PairLogps
from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class BCO(
    StepLevel,
    Loss,
    name="bco",
    requires_reference=True,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
    takes_unpaired=True,
):
    """Binary classifier optimization, -log sigma(beta r(w) - delta) - log sigma(delta - beta r(l)): delta is the running mean
    of both rewards, and no gradient flows through it.

    Jung et al. 2024 (arXiv:2404.04656), equation 9, without its importance weights. r are the log-ratios. TRL's bco_pair
    has delta = 0, which is shift=false here. At the start the loss is 2 ln 2. A response labelled on its own has its own
    term alone, and delta is the mean over all responses that there are.
    """

    momentum: float = 0.9
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def statistic(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, ""]:
        r = self.scores(policy, reference)
        count = (r.chosen_length > 0).sum() + (r.rejected_length > 0).sum()
        return (self.beta * (r.chosen + r.rejected)).sum().detach() / count * self.shift

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, " pairs"]:
        r = self.scores(policy, reference)
        delta = self.statistic(policy, reference) if running is None else running
        desirable = -log_sigmoid(self.beta * r.chosen - delta) * (r.chosen_length > 0)
        return desirable - log_sigmoid(delta - self.beta * r.rejected) * (r.rejected_length > 0)


@dataclass
class BetaDPO(
    StepLevel,
    Loss,
    name="beta_dpo",
    requires_reference=None,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
):
    """Dynamic beta, -log sigma(b h) with b = beta (1 + alpha (M - M0)): M is the mean margin beta h of the step, M0 its running
    mean; no gradient flows through b, which is at least a thousandth of beta.

    Wu et al. 2024 (arXiv:2407.08639), equations 7 and 8; their filter of pairs, which draws at random, is left out. At the
    start the loss is ln 2. Rewards are logged with beta, not with b.
    """

    alpha: float = 0.6
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss.alpha", self.alpha, 0, 0.6)
        check_momentum(self.momentum)

    def statistic(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, ""]:
        return (self.beta * self.scores(policy, reference).margin).mean().detach()

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, " pairs"]:
        mean = self.statistic(policy, reference)
        dynamic = 1 + self.alpha * (mean - (mean if running is None else running))
        return -log_sigmoid(self.beta * dynamic.clamp(min=1e-3) * self.scores(policy, reference).margin)


def check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"loss.momentum={momentum}: must lie in [0, 1); type e.g. loss.momentum=0.9")
