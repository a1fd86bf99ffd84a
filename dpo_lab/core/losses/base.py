"""The base class of losses: the traits that each states, and the table of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_lab.core.pairs import PairLogps
from dpo_lab.core.registry import add_to_table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LOSSES: dict[str, type[Loss]] = {}  # by name in configs


@dataclass
class Loss:
    """The base class of losses. beta: strength of the regularisation towards the reference, in units of the loss.

    A subclass states all of its traits, which have no defaults. name: its name in configs. requires_reference: True if
    the loss requires a reference that equals the initial policy, False if it requires reference=uniform, None if it
    takes any. is_bradley_terry: whether sigma(beta h) is the loss's probability of a label, as under the model of
    Bradley and Terry. is_per_token: whether the log-ratios that it compares are means over tokens instead of sums.
    is_margin_only: whether the loss of a pair is a function of its margin h alone.
    """

    requires_reference: ClassVar[bool | None]
    is_bradley_terry: ClassVar[bool]
    is_per_token: ClassVar[bool]
    is_margin_only: ClassVar[bool]
    beta: float = 0.1

    def __init_subclass__(
        cls,
        *,
        name: str,
        requires_reference: bool | None,
        is_bradley_terry: bool,
        is_per_token: bool,
        is_margin_only: bool,
    ) -> None:
        cls.requires_reference, cls.is_bradley_terry = requires_reference, is_bradley_terry
        cls.is_per_token, cls.is_margin_only = is_per_token, is_margin_only
        add_to_table(LOSSES, name, cls)

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta}: must be a positive number; type e.g. beta=0.1")

    def log_ratios(self, policy: PairLogps, reference: PairLogps) -> PairLogps:
        """Return the log-ratios that the loss compares; rewards are beta times these."""
        ratios = policy - reference
        return ratios.per_token() if self.is_per_token else ratios

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
        at_zero = self(*[PairLogps(zero, zero, zero + 1, zero + 1)] * 2).item()
        return {
            "requires_reference": self.requires_reference,
            "is_bradley_terry": self.is_bradley_terry,
            "is_per_token": self.is_per_token,
            "loss_at_zero_margin": at_zero if self.is_margin_only and self.requires_reference is not False else None,
        }


def log_sigmoid(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Return log sigma(x); value and gradient are finite at any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)
