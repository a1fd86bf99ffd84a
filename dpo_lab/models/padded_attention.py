"""Shared-prompt attention of short sequences on CPUs: padded, in the attention alone, to batched matrix products."""

from __future__ import annotations

from collections.abc import Sequence
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
    heads: dict[int, Heads] = field(default_factory=dict)

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

    def by_head(self, heads: int) -> Heads:
        """Return the padding with a row for each of `heads` heads."""
        if heads not in self.heads:
            self.heads[heads] = Heads.of(self, heads)
        return self.heads[heads]

    def mask(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return an additive causal mask [length, length]. window: the tokens up to its own that a token attends to."""
        key = (length, window, dtype)
        if key not in self.masks:
            ones = torch.ones(length, length, dtype=torch.bool)
            hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
            self.masks[key] = torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self.masks[key]


@dataclass(frozen=True)
class Heads:
    """A padding with a row for each head, in order of sequence, head and position: what batched products take.

    Rows are numbered as those of a tensor [., heads, d] flattened to [. * heads, d]. shapes: [sequences * heads, length]
    of each group; rows, back, unused, places, starts: see Padding.
    """

    shapes: list[tuple[int, int]]
    rows: Tensor
    back: Tensor
    unused: Tensor
    places: Tensor
    starts: Tensor

    @classmethod
    def of(cls, padding: Padding, heads: int) -> Heads:
        head, at, rows, numbers = np.arange(heads), 0, [], []
        for count, length in padding.shapes:
            of_group = padding.rows[at : at + count * length].numpy().reshape(count, 1, length)
            rows.append((of_group * heads + head[:, None]).ravel())
            number = at * heads + np.arange(count * heads * length).reshape(count, heads, length)
            numbers.append(number.transpose(0, 2, 1).reshape(-1, heads))  # of each padded row and head
            at += count * length
        number, places, starts = np.concatenate(numbers), padding.places.numpy(), padding.starts.numpy()
        counts = np.diff(starts, append=len(places))
        first, count = (np.repeat(each, counts)[:, None] for each in (starts, counts))
        order = first * (heads - 1) + np.arange(len(places))[:, None] + count * head  # by row of the stream, then head
        bags = np.empty(order.size, np.int64)
        bags[order] = number[places]
        found = (
            np.concatenate(rows),
            number[padding.back.numpy()].ravel(),
            number[padding.unused.numpy()].ravel(),
            bags,
            (starts[:, None] * heads + counts[:, None] * head).ravel(),
        )
        return cls([(count * heads, length) for count, length in padding.shapes], *map(torch.from_numpy, found))

    def pad(self, stream: Tensor, only_queries: bool = False) -> list[Tensor]:
        """Return the rows [sequences * heads, length, d] of each group, from a stream [N, heads, d].

        only_queries: with zeros where a row is no query.
        """
        rows = stream.reshape(-1, stream.shape[-1]).index_select(0, self.rows)
        return self.split(rows.index_fill_(0, self.unused, 0) if only_queries else rows)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Return views [sequences * heads, length, d] of each group's part of all rows."""
        parts = rows.split([count * length for count, length in self.shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def sum_copies(self, rows: Tensor) -> Tensor:
        """Return a row for each row of the stream and head: the sum of those that are copies of it as a key."""
        return embedding_bag(self.places, rows, self.starts, mode="sum")


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
    """Attention [N, heads, dv] of queries and keys [N, heads, d] and values [N, heads, dv]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, padding: Padding, masks: list[Tensor], scale: float) -> Tensor:
        of_queries, of_keys = padding.by_head(q.shape[1]), padding.by_head(k.shape[1])
        padded = (of_queries.pad(q), of_keys.pad(k), of_keys.pad(v))
        saved, output = [], torch.empty(q.shape[1] * len(padding.rows), v.shape[2], dtype=q.dtype)
        parts = zip(masks, *padded, of_queries.split(output), strict=True)
        for mask, query, key, value, part in parts:
            query, part = (each.view(len(key), -1, each.shape[-1]) for each in (query, part))  # heads that share keys
            scores = torch.bmm(query, key.mT)
            by_head = scores.view(-1, *mask.shape)
            torch.add(mask, by_head, alpha=scale, out=by_head)
            probs = torch.softmax(scores, -1)
            torch.bmm(probs, value, out=part)
            saved += [query, key, value, probs]
        ctx.save_for_backward(*saved)
        ctx.padding, ctx.scale, ctx.heads, ctx.kv_heads = padding, scale, q.shape[1], k.shape[1]
        return output.index_select(0, of_queries.back).view(*q.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        with torch.autocast("cpu", enabled=False):
            return *_gradients(grad, ctx.saved_tensors, ctx.padding, ctx.heads, ctx.kv_heads, ctx.scale), *[None] * 3


def _gradients(
    grad: Tensor, saved: Sequence[Tensor], padding: Padding, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values from that of the output [N, heads, dv]."""
    of_queries, of_keys = padding.by_head(heads), padding.by_head(kv_heads)
    rows, size, size_v = len(padding.rows), saved[0].shape[-1], grad.shape[-1]
    sizes = ((heads, size), (kv_heads, size), (kv_heads, size_v))
    buffers = [grad.new_empty(rows * count, each) for count, each in sizes]
    outs = of_queries.split(buffers[0]), of_keys.split(buffers[1]), of_keys.split(buffers[2])
    groups = zip(of_queries.pad(grad, only_queries=True), *outs, strict=True)
    for number, (grad_output, of_query, of_key, of_value) in enumerate(groups):
        query, key, value, probs = saved[4 * number : 4 * number + 4]
        grad_output = grad_output.view(*query.shape[:2], size_v)
        grad_probs = torch.bmm(grad_output, value.mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(scale)
        torch.bmm(grad_scores, key, out=of_query.view_as(query))
        torch.bmm(grad_scores.mT, query, out=of_key)
        torch.bmm(probs.mT, grad_output, out=of_value)
    of_k, of_v = (of_keys.sum_copies(each).view(-1, kv_heads, each.shape[-1]) for each in buffers[1:])
    return buffers[0].index_select(0, of_queries.back).view(-1, heads, size), of_k, of_v
