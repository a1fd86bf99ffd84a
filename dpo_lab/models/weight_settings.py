"""How weights are kept and which are trained: their dtype, 4-bit types of a frozen base, low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Dtype(str, Enum):
    """The dtype of weights; that of computations is trainer.precision.

    In bfloat16 a frozen weight takes 2 bytes. A trained one takes 16 bytes in both: in bfloat16 2 for the weight, 2 for
    its gradient, and 12 for AdamW's float32 master copy and moments, see training/master_weights.py.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(str, Enum):
    """The 4-bit type of a frozen base, by bitsandbytes: NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    nf4 = "nf4"


@dataclass
class Lora:
    """Low-rank adapters: W + lora_alpha / r B A with B = 0 initially (Hu et al. 2021, arXiv:2106.09685, equation 3).

    r: their rank; None trains all weights. target_modules: names of the matrices with adapters, or all-linear: all but
    the LM head. The names are those of peft's LoraConfig.
    """

    r: int | None = None
    lora_alpha: int = 32
    target_modules: Any = "all-linear"  # a name or a list of names

    def __post_init__(self) -> None:
        for name, value in (("r", self.r), ("lora_alpha", self.lora_alpha)):
            if value is not None and value < 1:
                raise ValueError(f"policy.lora.{name}={value}: must be 1 or more; type e.g. policy.lora.{name}=16")
