"""torch's variable-length attention on the CPU, by its documented contract: importing this registers it there.

torch has the operator for CUDA alone. What calls it, its checks and its autograd are torch's own; of the kernel this is a
plain softmax a sequence, in float64 for float64 tensors, and it refuses what the kernel would read wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.attention.varlen  # defines the operators
from torch import Tensor

CALLS: Counter[str] = Counter()  # of the kernel, forward and backward


@cache
def allowed(queries: int, keys: int, left: int, right: int) -> Tensor:
    """Which keys a query attends to, [queries, keys]: a window around it, where its last is aligned with the last key."""
    ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    return ((ahead <= right) | (right < 0)) & ((-ahead <= left) | (left < 0))


def check_contract(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape
    assert q.shape[2] == k.shape[2]
    assert q.shape[1] % k.shape[1] == 0
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    for cu, longest, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert (cu[0], cu[-1]) == (0, tokens)
        assert cu.diff().max() == longest


def sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float | None,
    window: list[int] | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Of each sequence: its slices of queries and of keys, q, k and v [heads, tokens, d], its scaled scores."""
    check_contract(q, k, v, cu_q, cu_k, max_q, max_k)
    left, right = window or (-1, -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    for at_q, to_q, at_k, to_k in zip(*(each.tolist() for each in (cu_q, cu_q[1:], cu_k, cu_k[1:])), strict=False):
        queries, keys, values = (x.transpose(0, 1).to(wide) for x in (q[at_q:to_q], k[at_k:to_k], v[at_k:to_k]))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores = queries @ keys.mT * (q.shape[2] ** -0.5 if scale is None else scale)
        mask = allowed(to_q - at_q, to_k - at_k, left, 0 if is_causal else right)
        yield queries, keys, values, scores.masked_fill(~mask, float("-inf"))


@torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    enable_gqa: bool = False,
    *unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert not any(unsupported)
    CALLS["forward"] += 1
    outputs, lse = [], []
    for _, _, values, scores in sequences(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window):
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
        lse.append(scores.logsumexp(-1).float())
    return torch.cat(outputs).to(q.dtype), torch.cat(lse, 1), torch.zeros(2, dtype=torch.uint64)


@torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng: Tensor,
    scale: float | None = None,
    window: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    CALLS["backward"] += 1
    grads: tuple[list[Tensor], ...] = ([], [], [])
    grads_out = grad.tensor_split(cu_q[1:-1].long())
    found = sequences(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window)
    for one, (queries, keys, values, scores) in zip(grads_out, found, strict=True):
        one = one.transpose(0, 1).to(scores.dtype)
        weights = scores.softmax(-1)
        of_weights = one @ values.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores = of_scores * (q.shape[2] ** -0.5 if scale is None else scale)
        groups = (k.shape[1], -1)
        grads[0].append((of_scores @ keys).transpose(0, 1))
        grads[1].append((of_scores.mT @ queries).unflatten(0, groups).sum(1).transpose(0, 1))
        grads[2].append((weights.mT @ one).unflatten(0, groups).sum(1).transpose(0, 1))
    dq, dk, dv = (torch.cat(each).to(q.dtype) for each in grads)
    return dq, dk, dv
