"""Which of Lightning's precisions a run may compute in, and how slow bfloat16 is on a CPU without products of it.

This module does not import torch when it is imported.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dpo_lab.config.allowed_targets import is_sharded
from dpo_lab.models.policy import Dtype, PolicyConfig

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer

log = logging.getLogger("dpo_lab")

ALIASES = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
CONVERTED = ("bf16-true", "16-true", "64-true", "transformer-engine", "transformer-engine-float16")
SIZE = 128  # of the square matrices in bf16_slowdown


def check_precision(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError, naming a supported precision, if `trainer.precision` is not supported.

    Only 32-true, bf16-mixed and, on a GPU, 16-mixed leave the weights as they were when the reference was computed.
    """
    asked = canonical(trainer.get("precision"))
    if asked in CONVERTED:
        remedy = "32-true" if asked == "64-true" else "bf16-mixed"
        raise ValueError(
            f"trainer.precision={asked}: weights would be converted after the reference was computed with them, so the"
            f" policy would differ from its reference at the start; type trainer.precision={remedy}"
        )
    if asked == "16-mixed" and trainer.get("accelerator") == "cpu":
        raise ValueError(
            "trainer.precision=16-mixed: Lightning computes in bf16 instead on a CPU; type trainer.precision=bf16-mixed"
        )
    if asked == "16-mixed" and is_sharded(trainer):
        raise ValueError(
            "trainer.precision=16-mixed: gradient scaling does not support gradients that are sharded over ranks;"
            " type trainer.precision=bf16-mixed, or trainer=ddp"
        )


def check_device_precision(settings: Mapping[str, Any], trainer: Trainer) -> None:
    """Raise MisconfigurationException if Lightning selected another precision than requested for its device."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    asked, chosen = canonical(settings.get("precision")), trainer.precision_plugin.precision
    if asked != chosen:
        raise MisconfigurationException(
            f"trainer.precision={asked}: on this device Lightning computes in {chosen}; type trainer.precision={chosen}"
        )


def canonical(precision: Any) -> str:
    """Return Lightning's full name of a precision, such as 16-mixed for 16."""
    return ALIASES.get(str(precision), str(precision))


def bf16_slowdown() -> float:
    """Measure in a few milliseconds the time of a bfloat16 matrix product on this CPU relative to float32."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(SIZE, SIZE, dtype=dtype)
        _timed(lambda: a @ a)  # the first call selects a kernel
        return min(_timed(lambda: a @ a) for _ in range(3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def warn_of_slow_bf16(trainer: Trainer, policy: PolicyConfig) -> None:
    """Log a warning if a run computes in bfloat16 on a CPU where that is slower than float32."""
    in_bf16 = trainer.precision_plugin.precision == "bf16-mixed" or getattr(policy, "dtype", None) == Dtype.bfloat16
    if trainer.strategy.root_device.type != "cpu" or not in_bf16 or (factor := bf16_slowdown()) < 1.5:
        return
    log.warning(
        "bfloat16 is slow on this CPU: a matrix product takes %.1f times as long as in float32;"
        " type trainer.precision=32-true policy.dtype=float32 to compute in float32",
        factor,
    )


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
