"""Copies of a policy to train, or to keep as the reference, which share what is frozen."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainable_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the trainable weights of a model; frozen ones are shared, so LoRA keeps one base model in memory."""
    from dpo_lab.models.sharded_weights import sharded_copy
    from dpo_lab.models.sharding import is_sharded

    if is_sharded(model):
        return sharded_copy(model)
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its adapters merged into their base, on the CPU: a GPU need not hold the base twice.

    A quantized model stays where it is, for kernels of its own merge it.
    """
    from dpo_lab.models.paths import causal_lm

    if getattr(causal_lm(model), "is_quantized", False):
        return copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    home = model.device
    model.to("cpu")  # type: ignore[arg-type]
    try:
        return copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    finally:
        model.to(home)  # type: ignore[arg-type]
