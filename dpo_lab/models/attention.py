"""Shared-prompt attention: in a packed stream every response attends to its item's prompt, which is stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpo_lab.models.padded_attention import Padding, are_short, padded_attention
from dpo_lab.models.varlen import CAUSAL, Layout, supports, varlen_attention

SHARED_PROMPT = "shared_prompt"  # name of this attention in transformers' registry
WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions", "cache_position"}  # arguments of some models


@dataclass
class Segments:
    """The segments of a packed stream: lengths [B][1 + K], numbers of tokens of each item's prompt and K responses.

    Masks and the kernel's layout are built for the first layer and shared by all.
    """

    lengths: Sequence[Sequence[int]]
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    layouts: dict[torch.device, Layout] = field(default_factory=dict)
    padded: Padding | None = None

    def layout(self, device: torch.device) -> Layout:
        """Return the layout for the variable-length kernel on a device."""
        if device not in self.layouts:
            self.layouts[device] = Layout.of(self.lengths, device)
        return self.layouts[device]

    def padding(self) -> Padding:
        """Return the padding of short sequences."""
        if self.padded is None:
            self.padded = Padding.of(self.lengths)
        return self.padded

    def mask(self, prompt: int, response: int, window: int | None, like: Tensor) -> Tensor:
        """Return an additive causal mask [response, prompt + response] over the prompt and the response itself.

        window: the number of tokens up to its own that a token attends to.
        """
        key = (prompt, response, window, like.dtype)
        if key not in self.masks:
            ones = torch.ones(response, prompt + response, dtype=torch.bool, device=like.device)
            hidden = ones.triu(prompt + 1) if window is None else ones.triu(prompt + 1) | ones.tril(prompt - window)
            self.masks[key] = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
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
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute causal attention [1, N, heads, d] over a packed stream, from query, key, value [1, heads, N, d].

    Without `segments` this is transformers' SDPA attention, so the same model also runs padded rows and generation. With
    them it is one call of the variable-length kernel where that is supported, elsewhere one SDPA call per response, or
    batched products of padded sequences where these are short. sliding_window: the number of tokens up to its own that a
    token attends to, all if None.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:
            raise TypeError("its layers do not pass the segments of a stream on to their attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if others := {name for name, given in kwargs.items() if given is not None} - WITHOUT_EFFECT:
        raise TypeError(f"its attention has {', '.join(sorted(others))}, which shared prompts can't have")
    if supports(query, value, dropout):
        window = CAUSAL if sliding_window is None else (sliding_window - 1, 0)
        return varlen_attention(query, key, value, segments.layout(query.device), scaling, window), None
    if query.device.type != "cpu":
        return attention_by_response(query, key, value, segments, scaling, dropout, sliding_window), None
    # SDPA's backward pass takes up to 5 times as long in 16 bits
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        inputs = query.to(dtype), key.to(dtype), value.to(dtype)
        if dropout == 0 and are_short(segments.lengths, query):
            output = padded_attention(*inputs, segments.padding(), scaling, sliding_window)
        else:
            output = attention_by_response(*inputs, segments, scaling, dropout, sliding_window)
        return output.to(value.dtype), None


def attention_by_response(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Compute what shared_prompt_attention does by one SDPA call per response, on any device."""
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
        if window is None or window >= q.shape[2]:
            outputs.append(scaled_dot_product_attention(q, first_k, first_v, is_causal=True, **attend))
        else:
            mask = segments.mask(0, q.shape[2], window, like=q)
            outputs.append(scaled_dot_product_attention(q, first_k, first_v, attn_mask=mask, **attend))
        for response in others:
            q, k, v = next(parts)
            if not response:  # of a pair with one side
                continue
            k = torch.cat((first_k[:, :, :prompt], k), 2)
            v = torch.cat((first_v[:, :, :prompt], v), 2)
            mask = segments.mask(prompt, response, window, like=q)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **attend))
    return torch.cat([o.transpose(1, 2) for o in outputs], 1)


def mask_of_rows(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    local_size: int | None = None,
    **kwargs,
) -> Tensor | None:
    """Return transformers' mask for SDPA, of rows without segments: bool, broadcastable to [B, 1, q_length, kv_length].

    attention_mask: 1 where a token is no padding, [B, kv_length]. For one new token per row, which attends to all before it,
    it is the mask, and the computation that transformers makes for any mask is skipped.
    """
    attends_to_all = q_length == 1 and mask_function is causal_mask_function and local_size is None
    if attends_to_all and attention_mask is not None and attention_mask.shape[1] == kv_length + kv_offset:
        return attention_mask[:, None, None, kv_offset:]
    sizes = {"q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset, "local_size": local_size}
    return sdpa_mask(attention_mask=attention_mask, mask_function=mask_function, **sizes, **kwargs)


AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
AttentionMaskInterface.register(SHARED_PROMPT, mask_of_rows)
