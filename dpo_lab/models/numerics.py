"""What a model's outputs depend on besides weights and input: device, dtypes, attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.paths import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def numerics_of(model: PreTrainedModel, context: Callable[[], AbstractContextManager]) -> str:
    """Describe how `model` computes on its device under `context`; the keys of all caches of its outputs include this.

    Autocast depends on the device type, so its dtype is read from a matrix product on the model's device.
    """
    device = next(model.parameters()).device
    with context():
        product = torch.empty(1, 1, device=device) @ torch.empty(1, 1, device=device)
    parts = [device.type, model.dtype, product.dtype, torch.get_float32_matmul_precision()]
    parts.append(causal_lm(model).config._attn_implementation)
    parts += [] if uses_cache(model) else ["without a KV cache"]
    if device.type == "cuda":  # scaled_dot_product_attention selects one of the enabled kernels
        kernels = torch.backends.cuda
        flags = (kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled())
        parts += [f"{name} {enabled}" for name, enabled in zip(("cudnn", "flash", "efficient"), flags, strict=True)]
    return ", ".join(str(part) for part in parts)
