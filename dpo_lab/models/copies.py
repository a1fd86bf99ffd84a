"""Copies of a policy to train, or to keep as the reference, which share what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def trainable_copy(model: PreTrainedModel, added: Mapping[str, nn.Module] | None = None) -> PreTrainedModel:
    """Copy the trainable weights of a model; frozen ones are shared, so LoRA keeps one base model in memory.

    added: modules that become attributes of the copy by these names; all their weights become 0.
    """
    from dpo_lab.models.sharded_weights import sharded_copy
    from dpo_lab.models.sharding import is_sharded

    if is_sharded(model):
        return sharded_copy(model, added)
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    for name, module in (added or {}).items():
        for parameter in module.parameters():
            parameter.data.zero_()
        setattr(copied, name, module.to(next(model.parameters()).device))
    return copied
