"""Shared-prompt attention of short sequences on CPUs: padded, in the attention alone, to batched matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

MULTIPLE = 8  # padded lengths are multiples of it, for which products and softmax have fast kernels
FULL = 0.9  # the smallest share of its group's padded length that a sequence, rounded up, may have
SHORT = 300_000  # head size times heads times squared length; above it a call of SDPA per sequence is as fast


@dataclass
class Padding:
    """The padded sequences of a packed stream, in groups of one length; indices are int64, in order of padded rows.

    A sequence is an item's prompt and one response; a prompt's queries belong to its first response alone. shapes:
    number of sequences and padded length of each group; rows: the row of the stream that each padded row holds (0 for
    padding); back: the padded row of each of the stream's queries; unused: the padded rows that are no query. places,
    starts: the padded rows that each row of the stream became as a key, and where they begin in `places`.
    """

    shapes: list[tuple[int, int]]
    rows: Tensor
    back: Tensor
    unused: Tensor
    places: Tensor
    starts: Tensor
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Padding:
        """Return the padding of a stream of B items, lengths [B][1 + K].

        >>> Padding.of([[2, 1, 3]])     # prompt 0 1, responses 2 and 3 4 5
        shapes [(2, 8)], rows [0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 3, 4, 5, 0, 0, 0], back [0, 1, 2, 10, 11, 12]
        """
        parts = np.array(lengths)
        prompts, keys = np.broadcast_arrays(parts[:, :1], parts[:, :1] + parts[:, 1:])
        begins = parts.cumsum().reshape(parts.shape) - parts  # of each part in the stream
        starts = np.broadcast_to(begins[:, :1], keys.shape)
        skipped = begins[:, 1:] - starts - prompts  # tokens of other responses between prompt and response
        repeated = prompts * (np.arange(keys.shape[1]) > 0)  # keys that are no query
        start, prompt, skip, size, first = (
            each.ravel()[:, None] for each in (starts, prompts, skipped, keys, repeated)
        )
        shapes, rows, queries = [], [], []
        for group, length in _alike(size[:, 0]):
            at = np.arange(length)
            row = np.where(at < size[group], start[group] + at + (at >= prompt[group]) * skip[group], -1)
            shapes.append((len(group), length))
            rows.append(row.ravel())
            queries.append(np.where(at >= first[group], row, -1).ravel())
        row, query = np.concatenate(rows), np.concatenate(queries)
        real, counts = np.flatnonzero(row >= 0), np.bincount(row[row >= 0])
        unused = np.flatnonzero(query < 0)
        back = query.argsort(kind="stable")[len(unused) :]
        places = real[row[real].argsort(kind="stable")]
        found = (row.clip(0), back, unused, places, counts.cumsum() - counts)
        rows_of_all, back, unused, places, starts = (torch.from_numpy(each) for each in found)
        return cls(shapes, rows_of_all, back, unused, places, starts)

    def mask(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return an additive causal mask [length, length]. window: the tokens up to its own that a token attends to."""
        key = (length, window, dtype)
        if key not in self.masks:
            ones = torch.ones(length, length, dtype=torch.bool)
            hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
            self.masks[key] = torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self.masks[key]


def are_short(lengths: Sequence[Sequence[int]], query: Tensor) -> bool:
    """Return whether padded products are faster than a call of SDPA per sequence: on a CPU, where sequences are small.

    With one response per prompt such a call needs neither a mask nor a copy of the prompt, and is about as fast.
    """
    squares = [(prompt + size) ** 2 for prompt, *responses in lengths for size in responses]
    share = query.shape[1] * query.shape[3] * sum(squares)
    return query.device.type == "cpu" and len(squares) > len(lengths) and share <= SHORT * len(squares)


def _alike(sizes: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Group sequences, the longest first, by padded length; return their indices and the length of each group."""
    order, groups = np.argsort(-sizes, kind="stable"), []
    rounded = -(-sizes // MULTIPLE) * MULTIPLE
    while len(order):
        length = rounded[order[0]]
        count = int((rounded[order] >= FULL * length).sum())
        groups.append((order[:count], int(length)))
        order = order[count:]
    return groups


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Padding, scale: float | None, window: int | None = None
) -> Tensor:
    """Compute attention [1, N, heads, d] over a packed stream, from query, key, value [1, heads, N, d].

    window: the number of tokens up to its own that a token attends to, all if None.
    """
    q, k, v = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    masks = [padding.mask(length, window, query.dtype) for _, length in padding.shapes]
    output = _Padded.apply(q, k, v, padding, masks, query.shape[-1] ** -0.5 if scale is None else scale)
    return output.unsqueeze(0)  # type: ignore[union-attr]


class _Padded(torch.autograd.Function):
    """Attention [N, heads, d] of queries, keys and values [N, heads, d]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, padding: Padding, masks: list[Tensor], scale: float) -> Tensor:
        padded = (_pad(each.flatten(1).index_select(0, padding.rows), padding, each.shape[1]) for each in (q, k, v))
        saved, outputs = [], []
        for (count, length), mask, query, key, value in zip(padding.shapes, masks, *padded, strict=True):
            query = query.view(len(key), -1, query.shape[-1])  # heads that share keys take one product
            scores = torch.bmm(query, key.mT)
            by_head = scores.view(count * q.shape[1], length, length)
            torch.add(mask, by_head, alpha=scale, out=by_head)
            probs = torch.softmax(scores, -1)
            outputs.append(torch.bmm(probs, value))
            saved += [query, key, value, probs]
        ctx.save_for_backward(*saved)
        ctx.padding, ctx.scale, ctx.heads, ctx.kv_heads = padding, scale, q.shape[1], k.shape[1]
        return _unpad(outputs, padding, q.shape[1]).index_select(0, padding.back).unflatten(1, (q.shape[1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        with torch.autocast("cpu", enabled=False):
            return (
                *_gradients(grad, ctx.saved_tensors, ctx.padding, ctx.heads, ctx.kv_heads, ctx.scale),
                None,
                None,
                None,
            )


def _gradients(
    grad: Tensor, saved: Sequence[Tensor], padding: Padding, heads: int, kv_heads: int, scale: float
) -> Iterator[Tensor]:
    """Yield the gradients of queries, keys and values from that of the output [N, heads, d]."""
    rows = grad.flatten(1).index_select(0, padding.rows).index_fill_(0, padding.unused, 0)
    grads = []
    for number, grad_output in enumerate(_pad(rows, padding, heads)):
        query, key, value, probs = saved[4 * number : 4 * number + 4]
        grad_output = grad_output.view(len(key), -1, grad_output.shape[-1])
        grad_probs = torch.bmm(grad_output, value.mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(scale)
        products = (grad_scores, key), (grad_scores.mT, query), (probs.mT, grad_output)
        grads.append([torch.bmm(*product) for product in products])
    of_queries, *others = zip(*grads, strict=True)
    yield _unpad(of_queries, padding, heads).index_select(0, padding.back).unflatten(1, (heads, -1))
    for each in others:
        sums = embedding_bag(padding.places, _unpad(each, padding, kv_heads), padding.starts, mode="sum")
        yield sums.unflatten(1, (kv_heads, -1))


def _pad(rows: Tensor, padding: Padding, heads: int) -> list[Tensor]:
    """Return each group's part of the padded rows [rows, heads * d] as [sequences * heads, length, d]."""
    groups = rows.unflatten(1, (heads, -1)).split([count * length for count, length in padding.shapes])
    return [
        group.unflatten(0, shape).transpose(1, 2).contiguous().flatten(0, 1)
        for group, shape in zip(groups, padding.shapes, strict=True)
    ]


def _unpad(groups: Sequence[Tensor], padding: Padding, heads: int) -> Tensor:
    """Return padded rows [rows, heads * d] from the groups; the inverse of `_pad`."""
    return torch.cat(
        [
            group.view(count, heads, length, -1).transpose(1, 2).reshape(count * length, -1)
            for group, (count, length) in zip(groups, padding.shapes, strict=True)
        ]
    )
