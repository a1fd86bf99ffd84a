"""The base class of losses: the traits that each states, and the table of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_lab.core.pairs import PairLogps
from dpo_lab.core.registry import add_to_table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from dpo_lab.core.pair_table import PairTable

EXPONENT = 40.0  # the largest exponent of a score: its square fits into float32
LOSSES: dict[str, type[Loss]] = {}  # by name in configs


class Divergence(str, Enum):
    """The divergence from the reference that limits the policy."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js = "js"
    alpha = "alpha"


class Weighting(str, Enum):
    """The weight of a pair in the loss."""

    none = "none"
    wpo = "wpo"  # by the policy's own probability of both responses


@dataclass
class Loss:
    """The base class of losses. beta: strength of the regularisation towards the reference, in units of the loss.
    divergence: what beta weighs, see `scores`; divergence_alpha: the alpha of divergence=alpha. ld_alpha: the weight of
    the tokens of the longer response beyond the length of the shorter one, by policy and reference alike (LD-DPO, Liu et al.
    2024, arXiv:2409.06411); it changes the log-probabilities that the loss is given, see PairTable.tail_weight. weighting:
    of pairs; with wpo a pair's loss is multiplied with PairLogps.weight (Zhou et al. 2024, arXiv:2406.11827, equation 2).

    A subclass states all of its traits, which have no defaults. name: its name in configs. requires_reference: True if
    the loss requires a reference that equals the initial policy, False if it requires reference=uniform, None if it
    takes any. is_bradley_terry: whether sigma(beta h) is the loss's probability of a label, as under the model of
    Bradley and Terry. is_per_token: whether the log-ratios that it compares are means over tokens instead of sums.
    is_margin_only: whether the loss of a pair is a function of its margin h alone. Three are False unless stated.
    takes_unpaired: whether its terms are those of single responses, so that it takes responses that were labelled on their
    own. needs_scores: whether it takes PairLogps.score_gap from the reference's. needs_unrelated: whether it takes
    PairLogps.unrelated of policy and reference, for which its training scores a third response to each prompt.
    """

    name: ClassVar[str]
    requires_reference: ClassVar[bool | None]
    is_bradley_terry: ClassVar[bool]
    is_per_token: ClassVar[bool]
    is_margin_only: ClassVar[bool]
    takes_unpaired: ClassVar[bool]
    needs_scores: ClassVar[bool]
    needs_unrelated: ClassVar[bool]
    beta: float = 0.1
    divergence: Divergence = field(default=Divergence.reverse_kl, kw_only=True)
    divergence_alpha: float = field(default=0.5, kw_only=True)
    ld_alpha: float = field(default=1.0, kw_only=True)
    weighting: Weighting = field(default=Weighting.none, kw_only=True)

    def __init_subclass__(
        cls,
        *,
        name: str,
        requires_reference: bool | None,
        is_bradley_terry: bool,
        is_per_token: bool,
        is_margin_only: bool,
        takes_unpaired: bool = False,
        needs_scores: bool = False,
        needs_unrelated: bool = False,
    ) -> None:
        cls.name = name
        cls.requires_reference, cls.is_bradley_terry = requires_reference, is_bradley_terry
        cls.is_per_token, cls.is_margin_only, cls.takes_unpaired = is_per_token, is_margin_only, takes_unpaired
        cls.needs_scores, cls.needs_unrelated = needs_scores, needs_unrelated
        add_to_table(LOSSES, name, cls)

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta}: must be a positive number; type e.g. beta=0.1")
        if self.divergence is not Divergence.reverse_kl and self.requires_reference is False:
            raise ValueError(
                f"loss.divergence={self.divergence.value}: this loss has no reference to diverge from;"
                " type loss.divergence=reverse_kl"
            )
        if not 0 < self.divergence_alpha <= 1:
            raise ValueError(
                f"loss.divergence_alpha={self.divergence_alpha}: must lie in (0, 1]; type e.g. loss.divergence_alpha=0.5"
            )
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"loss.ld_alpha={self.ld_alpha}: must lie in [0, 1]; type e.g. loss.ld_alpha=0.5")
        if self.ld_alpha != 1 and self.is_per_token:
            raise ValueError(
                f"loss.ld_alpha={self.ld_alpha}: this loss takes the length out by a mean over tokens already; type"
                " loss.ld_alpha=1"
            )
        if self.weighs_pairs and (self.is_step_level or self.ld_alpha != 1):
            why = "this loss is one of a whole step" if self.is_step_level else "loss.ld_alpha weighs tokens"
            raise ValueError(
                f"loss.weighting={self.weighting.value}: weighs single pairs whose tokens weigh alike, and {why}; type"
                " loss.weighting=none"
            )

    def prepare(self, pairs: PairTable) -> PairTable:
        """Return the pairs with what the loss takes of them."""
        pairs = replace(pairs, tail_weight=self.ld_alpha, with_scores=self.needs_scores)
        return pairs.with_unrelated() if self.needs_unrelated else pairs

    @property
    def weighs_pairs(self) -> bool:
        """Whether the loss of a pair is multiplied with its weight, which the policy determines."""
        return self.weighting is Weighting.wpo

    @property
    def refusal(self) -> str | None:
        """Return the refusal of responses labelled on their own, which are named in place of `{}`; None if it takes
        them.
        """
        if self.takes_unpaired:
            return None
        others = " or ".join(f"loss={name}" for name, kind in sorted(LOSSES.items()) if kind.takes_unpaired)
        return f"loss={self.name}: it compares two responses, and {{}}; type {others}"

    @property
    def is_step_level(self) -> bool:
        """Whether the loss is a function of all pairs of an optimizer step together, see StepLevel."""
        return isinstance(self, StepLevel)

    def log_ratios(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        """Return log pi - log ref of both responses, or its mean over tokens if the loss is per token."""
        ratios = policy - reference
        return ratios.per_token() if self.is_per_token else ratios

    def scores(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        """Return what the loss compares; rewards are beta times these. They are f'(pi / ref) of the f-divergence: with the
        reverse KL divergence the log-ratios r, 1 - exp(-r) with the forward one, ln 2 + log sigma(r) with Jensen and
        Shannon's, (1 - exp(-alpha r)) / alpha with an alpha-divergence. All are 0 where pi = ref. Where a loss is per
        token they are divided by the number of tokens.

        Wang et al. 2023 (arXiv:2309.16240), table 1 and equation 9, without its constants.
        """
        if self.divergence is Divergence.reverse_kl:
            return self.log_ratios(policy, reference)
        ratios = policy - reference
        scores = replace(ratios, chosen=self._derivative(ratios.chosen), rejected=self._derivative(ratios.rejected))
        return scores.per_token() if self.is_per_token else scores

    def _derivative(self, ratios: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        if self.divergence is Divergence.js:
            return math.log(2) + log_sigmoid(ratios)
        alpha = 1.0 if self.divergence is Divergence.forward_kl else self.divergence_alpha
        return -(-alpha * ratios).clamp(max=EXPONENT).expm1() / alpha

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
        """Return the loss of each pair."""
        raise NotImplementedError

    def traits(self) -> dict[str, Any]:
        """Return the traits for the record of a run.

        loss_at_zero_margin: the loss of a policy that equals its reference (DPO: ln 2); None if the margin does not
        determine it, or if the loss has no reference.
        """
        import torch

        zero = torch.zeros(1, dtype=torch.float64)
        is_determined = self.is_margin_only and self.divergence is Divergence.reverse_kl
        is_determined = is_determined and self.requires_reference is not False
        at_zero = self(*[PairLogps(zero, zero, zero + 1, zero + 1, score_gap=zero)] * 2).item()
        return {
            "requires_reference": self.requires_reference,
            "is_bradley_terry": self.is_bradley_terry,
            "is_per_token": self.is_per_token,
            "loss_at_zero_margin": at_zero if is_determined else None,
        }


class StepLevel:
    """Mixed into a loss that is not a sum over pairs: it is called with all pairs of an optimizer step, of all ranks.

    momentum: of the running mean of `statistic` over steps, from which the loss may take its shift or its beta; 0 is the
    step's own. Where no mean is given, as for held-out pairs before the first step, it is that of the pairs.
    """

    momentum: float = 0.0

    def statistic(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " *terms"] | None:
        """Return the number whose running mean the loss takes, or one for each of its terms; None if it takes none."""
        return None

    def update(
        self, running: Float[Tensor, " *terms"], statistic: Float[Tensor, " *terms"]
    ) -> Float[Tensor, " *terms"]:
        """Return the running mean after a step."""
        return self.momentum * running + (1 - self.momentum) * statistic

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, " *terms"] | None = None
    ) -> Float[Tensor, " pairs"]:
        """Return a loss of each pair, whose sum is the loss of the step."""
        raise NotImplementedError


def log_sigmoid(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Return log sigma(x); value and gradient are finite at any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)
