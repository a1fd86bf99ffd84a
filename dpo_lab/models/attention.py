"""Shared-prompt attention: in a packed stream every response attends to its item's prompt, which is stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lab.models.varlen import Layout, supports, varlen_attention

SHARED_PROMPT = "shared_prompt"  # name of this attention in transformers' registry


@dataclass
class Segments:
    """The segments of a packed stream: lengths [B][1 + K], numbers of tokens of each item's prompt and K responses.

    Masks and the kernel's layout are built for the first layer and shared by all.
    """

    lengths: Sequence[Sequence[int]]
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)
    layouts: dict[torch.device, Layout] = field(default_factory=dict)

    def layout(self, device: torch.device) -> Layout:
        """Return the layout for the variable-length kernel on a device."""
        if device not in self.layouts:
            self.layouts[device] = Layout.of(self.lengths, device)
        return self.layouts[device]

    def mask(self, prompt: int, response: int, like: Tensor) -> Tensor:
        """Return an additive causal mask [response, prompt + response] over the prompt and the response itself."""
        key = (prompt, response, like.dtype)
        if key not in self.masks:
            mask = like.new_full((response, prompt + response), float("-inf"))
            self.masks[key] = mask.triu_(prompt + 1)
        return self.masks[key]


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute causal attention [1, N, heads, d] over a packed stream, from query, key, value [1, heads, N, d].

    Without `segments` this is transformers' SDPA attention, so the same model also runs padded rows and generation. With
    them it is one call of the variable-length kernel where that is supported, elsewhere one SDPA call per response.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if supports(query, value, dropout):
        return varlen_attention(query, key, value, segments.layout(query.device), scaling), None
    if query.device.type == "cuda":  # with enable_gqa, SDPA's fast kernels take no mask and no float32
        key, value = (repeat_kv(each, query.shape[1] // key.shape[1]) for each in (key, value))
    grouped = query.shape[1] != key.shape[1]
    # one split instead of a slice per segment, whose backward would write a gradient of the whole stream each
    sizes = [size for item in segments.lengths for size in (item[0] + item[1], *item[2:])]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = []
    for prompt, _, *others in segments.lengths:
        q, first_k, first_v = next(parts)
        attend = {"scale": scaling, "dropout_p": dropout, "enable_gqa": grouped}
        outputs.append(scaled_dot_product_attention(q, first_k, first_v, is_causal=True, **attend))
        for response in others:
            q, k, v = next(parts)
            if not response:  # of a pair with one side
                continue
            k = torch.cat((first_k[:, :, :prompt], k), 2)
            v = torch.cat((first_v[:, :, :prompt], v), 2)
            mask = segments.mask(prompt, response, like=q)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **attend))
    return torch.cat([o.transpose(1, 2) for o in outputs], 1), None


AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)
