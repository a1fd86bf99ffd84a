"""The losses: one small dataclass each, both its config schema and its formula, all in one table.

A loss takes the policy's and the reference's `PairLogps` and returns one loss per pair, [B]. h stands for the log-ratio
margin (log pi - log ref)(chosen) - (log pi - log ref)(rejected), sigma for the logistic function.

Nothing here imports torch at the top: formulas use tensor methods, so a config is checked without loading torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_lab.core.pairs import PairLogps


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigma(x), finite in value and gradient at any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


@dataclass
class Loss:
    """What all losses share. beta: how strongly the policy is held to the reference; its unit is the loss's own."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta}: must be a positive number; type e.g. beta=0.1")

    def log_ratios(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        """What the loss compares; rewards are beta times this."""
        return policy - reference

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
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
    """Conservative DPO, a smoothed label: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).

    Mitchell 2023, "A note on DPO with noisy preferences", equation 5. eps: label_smoothing, the share of labels taken
    to be wrong; at 1/2 the loss is symmetric in the two sides.
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
    """Robust DPO, unbiased under flips at rate eps: [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps), l(h) = -log sigma(beta h).

    Chowdhury et al. 2024 (arXiv:2403.00409), equation 12. May be negative. Not label smoothing: see CDPO.
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
    """(h - 1 / (2 beta))^2 over summed log-ratios. Azar et al. 2023 (arXiv:2310.12036), equation 17; beta is its tau."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return (h - 1 / (2 * self.beta)).square()


@dataclass
class IPOMean(PerToken):
    """(h - 1 / (2 beta))^2 over per-token log-ratios: what TRL and LLaMA-Factory call IPO."""

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
    """-log sigma(beta h - gamma) over per-token log-probabilities, no reference: h is the policy's own margin.

    Meng et al. 2024 (arXiv:2405.14734), equation 6. gamma is the target margin in units of the reward (beta times a mean
    log-probability); others state gamma / beta. Needs reference=uniform.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"loss.gamma={self.gamma}: must be 0 or more; type e.g. loss.gamma=1")

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        h = self.log_ratios(policy, reference).margin
        return -log_sigmoid(self.beta * h - self.gamma)


LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "cdpo": CDPO,
    "rdpo": RDPO,
    "ipo": IPOSum,
    "ipo_mean": IPOMean,
    "hinge": Hinge,
    "simpo": SimPO,
}
