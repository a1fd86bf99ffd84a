"""The optimizer and its schedule: AdamW, linear warm-up, then cosine or linear decay to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Decay(str, Enum):
    """The decay of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class Optim:
    """Settings of AdamW and its schedule. weight_decay applies to matrices only, not to norms and biases.

    max_grad_norm: gradients are clipped to this norm over all parameters (None: no clipping).
    """

    lr: float = 3e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 20
    decay: Decay = Decay.linear
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_at_least("optim.lr", self.lr, 0, "3e-4")
        check_at_least("optim.warmup_steps", self.warmup_steps, 0, 20)
        check_at_least("optim.weight_decay", self.weight_decay, 0, 0.01)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must lie in [0, 1); type e.g. optim.{name}=0.9")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"optim.max_grad_norm={self.max_grad_norm}: must be more than 0;"
                " type optim.max_grad_norm=1.0, or null for no limit"
            )

    def build(
        self, parameters: Iterable[nn.Parameter], total_steps: int, fused: bool = True
    ) -> tuple[Optimizer, LRScheduler]:
        """Return the optimizer of the trainable parameters, and its schedule over `total_steps` optimizer steps.

        Weights of 16 bits are trained with float32 master copies. fused: one pass over memory instead of ten, with
        different rounding.
        """
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import LambdaLR

        from dpo_lab.training.master_weights import MasterAdamW, is_short

        training = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in training if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in training if p.ndim < 2], "weight_decay": 0.0},
        ]
        kind = MasterAdamW if any(map(is_short, training)) else AdamW
        optimizer = kind([g for g in groups if g["params"]], lr=self.lr, betas=(self.beta1, self.beta2), fused=fused)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip gradients to max_grad_norm and return their norm before, which is not finite if a gradient is not."""
        from torch.nn.utils import clip_grad_norm_, get_total_norm

        if self.max_grad_norm is not None:
            return clip_grad_norm_(parameters, self.max_grad_norm)
        return get_total_norm([p.grad for p in parameters if p.grad is not None])

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor of `lr` at a step (0-based): it rises over the warm-up and would reach 0 at total_steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = max(0.0, (total_steps - step) / max(1, total_steps - self.warmup_steps))
        if self.decay is Decay.cosine:
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if self.decay is Decay.linear else 1.0
