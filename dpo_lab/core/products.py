"""Matrix products of 16-bit tensors whose float32 sums are not rounded to 16 bits, on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


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
