"""The LM head: from hidden states to logits, by a module, a scale and a soft-cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class LMHead:
    """An LM head of `vocabulary` logits: scale * module(hidden), then softcap * tanh(. / softcap) unless it is None."""

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None

    @property
    def linear(self) -> nn.Linear | None:
        """The module if it is a plain nn.Linear, whose gradient has a closed form, else None."""
        return self.module if type(self.module) is nn.Linear else None

    def __call__(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        """Return logits in float32 or higher; differentiable."""
        logits = self.module(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap
