"""A step's loss made linear in the log-probabilities of its pairs, so that it can be split into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float


@dataclass
class LinearLoss:
    """The values of a loss at the log-probabilities `at`, and its derivatives by them: a loss that is a sum over pairs, with
    the same value and gradient there.
    """

    losses: Float[Tensor, " pairs"]
    at: PairLogps
    by_chosen: Float[Tensor, " pairs"]
    by_rejected: Float[Tensor, " pairs"]

    @classmethod
    def of(cls, loss: Callable[[PairLogps], Tensor], at: PairLogps) -> LinearLoss:
        """Differentiate the sum of `loss`, a function of all log-probabilities of a step."""
        with torch.enable_grad():
            chosen, rejected = at.chosen.detach().requires_grad_(), at.rejected.detach().requires_grad_()
            losses = loss(replace(at, chosen=chosen, rejected=rejected))
            by_chosen, by_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True)
        return cls(losses.detach(), at, by_chosen, by_rejected)

    def __getitem__(self, pairs: slice) -> LinearLoss:
        return LinearLoss(self.losses[pairs], self.at[pairs], self.by_chosen[pairs], self.by_rejected[pairs])

    def __call__(self, policy: PairLogps) -> Float[Tensor, " pairs"]:
        """Return the loss of each pair at log-probabilities close to `at`."""
        moved = policy - self.at
        return self.losses + self.by_chosen * moved.chosen + self.by_rejected * moved.rejected
