"""The LM head on response tokens alone: log-probabilities, and a loss with its gradient, over chunks of bounded logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpo_lab.core.logps import sum_responses
from dpo_lab.core.pairs import chunk_by_size

ROWS, LOGITS = 512, 2**25  # a piece is at most so many rows and so many logits (128 MB in float32)

LossOf = Callable[[Tensor, slice], Tensor]  # log-probs [b, K] of some items' responses and which items -> one loss each


def rows_per_chunk(vocabulary: int) -> int:
    """Rows of a piece."""
    return max(1, min(ROWS, LOGITS // vocabulary))


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [R] of `targets` [R] under hidden [R, H] and an LM head [V, H]; float32 at least.

    Differentiable: a piece's logits are computed again in the backward.
    """

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets, reduction="none")

    size = rows_per_chunk(len(weight))
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return torch.cat([checkpoint(score, *piece, use_reentrant=False) for piece in pieces])  # type: ignore[arg-type]
    return torch.cat([score(*piece) for piece in pieces])


def fused_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, lengths: Tensor, loss_of: LossOf
) -> tuple[Tensor, Tensor]:
    """The sum of a batch's losses, differentiable, and the log-probabilities [B, K] that they came from, detached.

    hidden [R, H], weight [V, H], targets [R]: response rows in the stream's order; lengths [B, 1 + K]: see core/logps.py.
    The gradient is made in the forward: an item's loss depends on the log-probabilities of its K responses alone, so its
    derivative, one number a response, turns the item's logits into their gradient while they are at hand. That is 6 H V R
    FLOPs and no logits in memory but a piece of them; only an item of more rows than a piece has its logits computed twice.
    Logits are computed in autocast's dtype where it is on, their softmax in float32 at least.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _FusedLoss.apply(hidden, weight, targets, lengths, loss_of, dtype)  # type: ignore[return-value]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, lengths, loss_of, dtype):
        head = _Head(hidden, weight, targets, dtype, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        size, rows_of = rows_per_chunk(len(weight)), lengths[:, 1:].sum(1).tolist()
        total, sums, stop = 0, [], 0
        for items in chunk_by_size(rows_of, size):
            start, stop = stop, stop + sum(rows_of[items])
            pieces = [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
            logps = torch.cat([head.score(piece) for piece in pieces])
            with torch.enable_grad():
                logps.requires_grad_()
                group = sum_responses(logps, lengths[items])
                loss = loss_of(group, items).sum()
                (derivative,) = torch.autograd.grad(loss, logps)
            for piece in reversed(pieces):  # the last one's softmax is still at hand
                if piece != pieces[-1]:
                    head.score(piece)
                head.add_gradient(piece, derivative[piece.start - start : piece.stop - start])
            total = total + loss.detach()
            sums.append(group.detach())
        of_weight = None if head.of_weight is None else head.of_weight.to(weight.dtype)
        ctx.save_for_backward(head.of_hidden, of_weight)
        sums = torch.cat(sums)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx, grad, _):
        of_hidden, of_weight = (None if of is None else of.mul_(grad) for of in ctx.saved_tensors)
        return of_hidden, of_weight, None, None, None, None


class _Head:
    """One piece of logits at a time, in memory that all pieces share; gradients grow in of_hidden and of_weight."""

    def __init__(self, hidden, weight, targets, dtype, needs_hidden, needs_weight) -> None:
        self.hidden, self.weight, self.targets = hidden.detach().to(dtype), weight.detach().to(dtype), targets
        exact = torch.promote_types(dtype, torch.float32)
        self.of_hidden = torch.empty_like(hidden) if needs_hidden else None
        self.of_weight = torch.empty_like(weight, dtype=exact) if needs_weight else None
        self.started = False  # whether of_weight holds anything yet
        rows = min(rows_per_chunk(len(weight)), len(targets))
        self.probabilities = torch.empty(rows, len(weight), dtype=exact, device=hidden.device)
        self.logits = self.probabilities if dtype == exact else torch.empty_like(self.probabilities, dtype=dtype)

    def score(self, piece: slice) -> Tensor:
        """Log-probabilities of the piece's targets; leaves its softmax in `probabilities`."""
        hidden, targets = self.hidden[piece], self.targets[piece, None]
        logits, probabilities = self.logits[: len(hidden)], self.probabilities[: len(hidden)]
        torch.mm(hidden, self.weight.T, out=logits)
        if self.logits is not self.probabilities:
            probabilities.copy_(logits)
        highest = probabilities.amax(-1, keepdim=True)
        of_target = probabilities.gather(1, targets) - highest
        torch.softmax(probabilities, -1, out=probabilities)
        return (of_target + probabilities.amax(-1, keepdim=True).log())[:, 0]  # the highest has probability 1 / sum

    def add_gradient(self, piece: slice, derivative: Tensor) -> None:
        """Gradients of the piece whose softmax is at hand; derivative [rows]: of the loss by each log-probability."""
        hidden, targets = self.hidden[piece], self.targets[piece, None]
        logits, residual = self.logits[: len(hidden)], self.probabilities[: len(hidden)]
        residual.scatter_add_(1, targets, residual.new_full(targets.shape, -1.0))  # d logp / d logits, negated
        if self.logits is not self.probabilities:
            logits.copy_(residual)
        derivative = -derivative[:, None]
        if self.of_hidden is not None:
            self.of_hidden[piece] = (logits @ self.weight) * derivative
        if self.of_weight is not None:
            scaled = (hidden * derivative).to(logits.dtype)
            if logits.dtype == self.of_weight.dtype:
                self.of_weight.addmm_(logits.T, scaled, beta=float(self.started))
            elif self.started:
                self.of_weight += logits.T @ scaled
            else:
                self.of_weight.copy_(logits.T @ scaled)
            self.started = True
