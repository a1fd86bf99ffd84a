"""Shared-prompt attention in one call a layer on GPUs: torch's variable-length kernel, over keys that repeat prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from dpo_lab.core.pairs import to_device

CAUSAL = (-1, 0)  # window of any number of tokens to the left and none to the right, aligned at the last token


def supports(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether the kernel can compute this: bf16 or fp16 on an NVIDIA GPU since Ampere, without dropout."""
    head_size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and dropout == 0
        and _compute_dtype(query) in (torch.bfloat16, torch.float16)
        and head_size == value.shape[-1]
        and head_size % 8 == 0
        and head_size <= 256
        and torch.__version__ >= "2.13"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _compute_dtype(query: Tensor) -> torch.dtype:
    """Return autocast's dtype, which it does not apply to this kernel itself, or the query's where it is off."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


@dataclass(frozen=True)
class Layout:
    """Where the kernel finds a packed stream's sequences; its indices are int32, on the stream's device.

    A sequence is one response: its queries are the response, with the prompt before an item's first response; its keys
    are prompt and response. cu_q, cu_k: where each sequence begins among the queries, which are the stream, and among
    the keys, and the total; max_q, max_k: the longest. rows: which row of the stream each key is. places, starts: the
    keys that each row of the stream became, and where its keys begin in `places`.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    rows: Tensor
    places: Tensor
    starts: Tensor

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> Layout:
        """Return the layout of a stream of B items, lengths [B][1 + K]; it takes one copy to the device, without a sync.

        >>> Layout.of([[2, 1, 3]], "cpu")     # prompt 0 1, responses 2 and 3 4 5
        cu_q [0, 3, 6], cu_k [0, 3, 8], rows [0, 1, 2, 0, 1, 3, 4, 5]
        places [0, 3, 1, 4, 2, 5, 6, 7], starts [0, 2, 4, 5, 6, 7]
        """
        parts = np.array(lengths)
        prompts, responses = parts[:, :1], parts[:, 1:]
        begins = parts.cumsum().reshape(parts.shape) - parts  # of each part in the stream
        queries = np.hstack((prompts + responses[:, :1], responses[:, 1:]))
        keys = (prompts + responses) * (queries > 0)  # a response of no tokens, of a pair with one side, is no sequence
        cu_q, cu_k = (np.append(0, sizes[queries > 0].cumsum()) for sizes in (queries, keys))

        def per_key(values: np.ndarray) -> np.ndarray:
            return np.repeat(np.broadcast_to(values, keys.shape), keys.ravel())

        place = np.arange(cu_k[-1]) - np.repeat(cu_k[:-1], keys[queries > 0])  # of each key in its sequence
        skipped = begins[:, 1:] - begins[:, :1] - prompts  # tokens of other responses between prompt and response
        rows = per_key(begins[:, :1]) + place + (place >= per_key(prompts)) * per_key(skipped)
        counts = np.bincount(rows)
        found = (cu_q, cu_k, rows, rows.argsort(kind="stable"), counts.cumsum() - counts)
        together = to_device(torch.from_numpy(np.concatenate(found).astype(np.int32)), device)
        cu_q, cu_k, rows, places, starts = together.split([len(each) for each in found])
        return cls(cu_q, cu_k, int(queries.max()), int(keys.max()), rows, places, starts)

    def repeat(self, stream: Tensor) -> Tensor:
        """Return the keys (or values) [Tk, heads, d] of a stream [N, heads, d]; differentiable."""
        return stream if len(self.rows) == len(stream) else _Repeat.apply(stream, self)


class _Repeat(torch.autograd.Function):
    """Repeat rows of a stream; the gradient of a row is the sum of its copies', which embedding_bag adds in one order."""

    @staticmethod
    def forward(ctx, stream: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return stream.index_select(0, layout.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        sums = embedding_bag(ctx.layout.places, grad.flatten(1), ctx.layout.starts, mode="sum")
        return sums.view(-1, *grad.shape[1:]), None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, window: tuple[int, int] = CAUSAL
) -> Tensor:
    """Compute attention [1, N, heads, d] over a packed stream, from query, key, value [1, heads, N, d].

    window: how many tokens to the left and right of a query's position in its sequence it attends to.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, 1.6 s that a run on the CPU saves

    dtype = _compute_dtype(query)
    q, k, v = (each.squeeze(0).transpose(0, 1).to(dtype) for each in (query, key, value))
    output = varlen_attn(
        q,
        layout.repeat(k),
        layout.repeat(v),
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        scale=scale,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.unsqueeze(0)  # type: ignore[union-attr]  # a tensor, as no log-sum-exp is asked for
