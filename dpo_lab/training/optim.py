"""The optimizer and its schedule: AdamW, with a state of 32 or 8 bits, linear warm-up, then cosine or linear decay to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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


class OptimKind(str, Enum):
    """The optimizer: torch's AdamW, or that of bitsandbytes, whose two moments take 1 byte a weight each instead of 4.

    The paged one lets the driver move its state to the host's memory where that of the GPU is full.
    """

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"


@dataclass
class Optim:
    """Settings of AdamW and its schedule. weight_decay applies to matrices only, not to norms and biases.

    max_grad_norm: gradients are clipped to this norm over all parameters (None: no clipping).
    """

    kind: OptimKind = OptimKind.adamw
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
        if self.kind is not OptimKind.adamw and find_spec("bitsandbytes") is None:
            raise ValueError(f"optim.kind={self.kind.value} needs bitsandbytes; type pip install 'dpo_lab[quantized]'")

    def check(self, trains_16_bits: bool, is_sharded: bool, scales_gradients: bool = False) -> None:
        """Raise ValueError if the optimizer can't train weights kept in 16 bits, or sharded over ranks, or with gradients
        that are scaled (precision 16-mixed), which only torch's fused optimizer takes where they are clipped before its step.
        """
        if self.kind is OptimKind.adamw:
            return
        if scales_gradients:
            raise ValueError(
                f"optim.kind={self.kind.value}: it takes no scaled gradients; type trainer.precision=bf16-mixed, or"
                " optim.kind=adamw"
            )
        if trains_16_bits:
            raise ValueError(
                f"optim.kind={self.kind.value}: weights kept in 16 bits need the float32 master copies of"
                " optim.kind=adamw, else small updates are lost; type policy.dtype=float32, or policy.lora.r=16 for"
                " adapters in float32"
            )
        if is_sharded:
            raise ValueError(
                f"optim.kind={self.kind.value}: bitsandbytes can't update weights sharded over ranks; type"
                " optim.kind=adamw, whose state is sharded too, or trainer=ddp"
            )

    def build(
        self,
        parameters: Iterable[nn.Parameter],
        total_steps: int,
        fused: bool = True,
        critic: Iterable[nn.Parameter] = (),
        critic_factor: float = 1.0,
    ) -> tuple[Optimizer, LRScheduler]:
        """Return the optimizer of the trainable parameters, and its schedule over `total_steps` optimizer steps.

        Weights of 16 bits are trained with float32 master copies. fused: one pass over memory instead of ten, with
        different rounding. critic: parameters whose learning rate is lr x critic_factor.
        """
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import LambdaLR

        from dpo_lab.training.master_weights import MasterAdamW, is_short

        groups, training = [], []
        for members, lr in ((parameters, self.lr), (critic, self.lr * critic_factor)):
            trained = [p for p in members if p.requires_grad]
            training += trained
            groups += [
                {"params": [p for p in trained if p.ndim >= 2], "lr": lr, "weight_decay": self.weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
            ]
        groups, is_any_short = [g for g in groups if g["params"]], any(map(is_short, training))
        settings: dict[str, Any] = {"lr": self.lr, "betas": (self.beta1, self.beta2)}
        if self.kind is OptimKind.adamw:
            optimizer = (MasterAdamW if is_any_short else AdamW)(groups, fused=fused, **settings)
        else:
            self.check(trains_16_bits=is_any_short, is_sharded=False)
            optimizer = self._class_of_8_bits()(groups, **settings)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def state_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Return the bytes of the optimizer's state of the trainable parameters: moments, and master copies of 16 bits.

        The state of 8 bits is that of matrices of 4,096 weights and more; their scales are not counted.
        """
        from dpo_lab.training.master_weights import is_short

        total = 0
        for p in parameters:
            is_small = self.kind is not OptimKind.adamw and p.numel() >= 4096
            total += p.requires_grad * p.numel() * (2 if is_small else 12 if is_short(p) else 8)
        return total

    def _class_of_8_bits(self) -> type[Optimizer]:
        from bitsandbytes import optim  # type: ignore[import-not-found]

        return optim.AdamW8bit if self.kind is OptimKind.adamw_8bit else optim.PagedAdamW8bit

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
