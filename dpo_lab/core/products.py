"""Operators on 16-bit tensors: products whose float32 sums are not rounded, and casts of many tensors at once, on GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, whose dtype may differ: on a GPU by a few kernels for all.

    Of tensors that are sharded over ranks alike, each rank copies its shards.
    """
    if found := [*zip(*pairs, strict=True)]:
        to, of = ([getattr(tensor, "_local_tensor", tensor) for tensor in tensors] for tensors in found)
        torch._foreach_copy_(to, of)  # type: ignore[reportPrivateImportUsage]


def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], dtype: torch.dtype) -> Float[Tensor, "n m"]:
    """Return left @ right in `dtype`; on a GPU it is rounded to that dtype alone, on the CPU to that of `left` first."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def add_product(
    total: Float[Tensor, "n m"], left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], beta: float = 1.0
) -> None:
    """Set `total` to beta * total + left @ right, see `product`; with beta=0 it may hold anything before."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    elif beta == 0:
        total.copy_(left @ right)
    else:
        total.mul_(beta).add_(left @ right)
