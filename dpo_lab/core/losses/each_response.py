"""Losses that score chosen and rejected responses each on its own: NCA, SPPO, APO, Cal-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.losses.base import Loss, log_sigmoid
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# In formulas r(w) and r(l) are the log-ratios log pi - log ref of the chosen and of the rejected response.


@dataclass
class NCA(Loss, name="nca", requires_reference=True, is_bradley_terry=False, is_per_token=False, is_margin_only=False):
    """Noise contrastive alignment of pairs, -log sigma(beta r(w)) - [log sigma(-beta r(w)) + log sigma(-beta r(l))] / 2.

    Chen et al. 2024 (arXiv:2402.05369), equation 13 for two responses and hard labels. Unlike DPO's it has a minimum
    where r(w) = ln 2 / beta, so that chosen responses do not become less likely. At the start the loss is 2 ln 2.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r = self.scores(policy, reference)
        chosen, rejected = self.beta * r.chosen, self.beta * r.rejected
        return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


@dataclass
class SPPO(
    Loss, name="sppo", requires_reference=True, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """Self-play preference optimization with hard labels, (r(w) - 1 / (2 beta))^2 + (r(l) + 1 / (2 beta))^2.

    Wu et al. 2024 (arXiv:2405.00675), equation 4.7 with a winning probability of 1 for the chosen response and 0 for the
    rejected one; beta is 1 / eta. At the start the loss is 1 / (2 beta^2).
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r, target = self.scores(policy, reference), 1 / (2 * self.beta)
        return (r.chosen - target).square() + (r.rejected + target).square()


@dataclass
class APOZero(
    Loss, name="apo_zero", requires_reference=True, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """Anchored preference optimization, 1 - sigma(beta r(w)) + sigma(beta r(l)): chosen responses become more likely than
    under the reference, rejected ones less.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7; for chosen responses that are better than the policy's own.
    At the start the loss is 1.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r = self.scores(policy, reference)
        return (-self.beta * r.chosen).sigmoid() + (self.beta * r.rejected).sigmoid()


@dataclass
class APODown(
    Loss, name="apo_down", requires_reference=True, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """Anchored preference optimization, sigma(beta r(w)) + 1 - sigma(beta h): both responses become less likely than under
    the reference, rejected ones more so.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 8; for chosen responses that are worse than the policy's own.
    At the start the loss is 1.
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r = self.scores(policy, reference)
        return (self.beta * r.chosen).sigmoid() + (-self.beta * r.margin).sigmoid()


@dataclass
class CalDPO(
    Loss, name="cal_dpo", requires_reference=True, is_bradley_terry=False, is_per_token=False, is_margin_only=False
):
    """Calibrated DPO, -log sigma(h) + (r(w) - 1 / (2 beta))^2 + (r(l) + 1 / (2 beta))^2: a margin without beta, and the
    log-ratios themselves drawn to half of 1 / beta on either side.

    Xiao et al. 2024 (arXiv:2412.14516), equation 13. At the start the loss is ln 2 + 1 / (2 beta^2).
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        r, target = self.scores(policy, reference), 1 / (2 * self.beta)
        return -log_sigmoid(r.margin) + (r.chosen - target).square() + (r.rejected + target).square()
