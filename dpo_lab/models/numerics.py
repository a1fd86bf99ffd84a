"""What a model's outputs depend on besides weights and input: device, dtypes, attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.forward import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def numerics_of(model: PreTrainedModel, context: Callable[[], AbstractContextManager]) -> str:
    """Describe how `model` computes where it lies now, under `context`: part of the name of every cache of its outputs.

    Autocast is of a kind of device, so its dtype is that of a matrix product on the model's own device.
    """
    device = next(model.parameters()).device
    with context():
        product = torch.empty(1, 1, device=device) @ torch.empty(1, 1, device=device)
    parts = [device.type, model.dtype, product.dtype, torch.get_float32_matmul_precision()]
    parts.append(causal_lm(model).config._attn_implementation)
    parts += [] if uses_cache(model) else ["without a KV cache"]
    if device.type == "cuda":  # scaled_dot_product_attention takes one of those that are switched on
        kernels = torch.backends.cuda
        on = (kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled())
        parts += [f"{name} {enabled}" for name, enabled in zip(("cudnn", "flash", "efficient"), on, strict=True)]
    return ", ".join(str(part) for part in parts)
