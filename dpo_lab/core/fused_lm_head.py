"""The LM head on response tokens alone: log-probabilities, and a loss with its gradient, over chunks of bounded logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpo_lab.core.lm_head import LMHead
from dpo_lab.core.logps import sum_responses
from dpo_lab.core.pairs import chunk_by_size
from dpo_lab.core.products import add_product, product

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ROWS, LOGITS = 512, 2**25  # the largest number of rows and of logits in a chunk (128 MB in float32)
GPU_ROWS, GPU_SHARE = 2048, 1 / 32  # on a GPU: of rows, and of its memory for a chunk's logits in both dtypes

LossOf = Callable[[Tensor, slice], Tensor]  # (log-probs [b, K] of the items' responses, the items) -> one loss per item
# (log-probs [r] of the items' response tokens, log_squares [r] or None, these rows, the items) -> losses, what is returned
LossOfTokens = Callable[[Tensor, Tensor | None, slice, slice], tuple[Tensor, Tensor]]


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Return the number of rows of a chunk of logits.

    On a GPU it depends on all of its memory, not on what is free, so that a run repeats to the bit.
    """
    rows, logits = ROWS, LOGITS
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
        rows, logits = GPU_ROWS, max(LOGITS, int(memory * GPU_SHARE) // 6)  # 4 bytes in float32 and 2 in 16 bits
    return max(1, min(rows, logits // vocabulary))


def token_logps(
    hidden: Float[Tensor, "rows width"], head: LMHead, targets: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Return the log-probabilities of `targets`, in nats, given hidden states and an LM head.

    Computed in float32 or higher. Differentiable: the backward pass recomputes the logits of each chunk.
    """

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden), targets, reduction="none")

    size = rows_per_chunk(head.vocabulary, hidden.device)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in head.module.parameters())):
        return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])  # type: ignore[arg-type]
    return torch.cat([score(*chunk) for chunk in chunks])


def relative_sums(
    logps: Float[Tensor, " rows"],
    log_squares: Float[Tensor, " rows"] | None,
    lengths: Int[np.ndarray, "items parts"],
    weights: Float[Tensor, " rows"] | None,
) -> Float[Tensor, "items sums"]:
    """Sum token log-probabilities over each response; beside these, without gradient, those relative to `log_squares`."""
    sums = sum_responses(logps, lengths, weights)
    if log_squares is None:
        return sums
    return torch.cat((sums, sum_responses((logps - log_squares).detach(), lengths, weights)), 1)


@torch.no_grad()
def token_log_squares(hidden: Float[Tensor, "rows width"], head: LMHead) -> Float[Tensor, " rows"]:
    """Return log sum_v p(v)^2 of each row's distribution p over the vocabulary."""
    logits = (head(chunk) for chunk in hidden.split(rows_per_chunk(head.vocabulary, hidden.device)))
    return torch.cat([(2 * each).logsumexp(-1) - 2 * each.logsumexp(-1) for each in logits])


def fused_loss(
    hidden: Float[Tensor, "rows width"],
    head: LMHead,
    targets: Int[Tensor, " rows"],
    lengths: Int[np.ndarray, "items parts"],
    loss_of: LossOf,
    weights: Float[Tensor, " rows"] | None = None,
    is_relative: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "items sums"]]:
    """Return the sum of a batch's losses, differentiable, and the log-probabilities of responses, detached.

    hidden, targets: response rows in the order of the stream; lengths, weights: see core/logps.py. For what it costs see
    fused_token_loss.

    is_relative: whether loss_of is given, beside the K sums of an item, those of log p(token) - log sum_v p(v)^2, which have
    no gradient; they are returned too.
    """

    def of_tokens(logps: Tensor, log_squares: Tensor | None, rows: slice, items: slice) -> tuple[Tensor, Tensor]:
        group = relative_sums(logps, log_squares, lengths[items], None if weights is None else weights[rows])
        return loss_of(group, items), group

    return fused_token_loss(hidden, head, targets, lengths, of_tokens, is_relative)


def fused_token_loss(
    hidden: Float[Tensor, "rows width"],
    head: LMHead,
    targets: Int[Tensor, " rows"],
    lengths: Int[np.ndarray, "items parts"],
    loss_of: LossOfTokens,
    is_relative: bool = False,
) -> tuple[Float[Tensor, ""], Tensor]:
    """Return the sum of a batch's losses of token log-probabilities, differentiable, and what loss_of returns beside them,
    detached and concatenated over items.

    The forward pass already computes the gradient: an item's loss depends only on the log-probabilities of its K responses,
    so its derivative, one number per token, turns the item's logits into their gradient while they are in memory. This
    takes 6 H V R FLOPs and holds one chunk of logits; logits are computed twice only for an item of more rows than a
    chunk. Logits are computed in the dtype of autocast if it is enabled, their softmax in float32 or higher. A head that is
    not linear is differentiated by autograd, which computes logits twice.

    is_relative: whether loss_of is given log sum_v p(v)^2 of each row too, see token_log_squares.
    """
    if head.linear is None:
        log_squares = token_log_squares(hidden, head) if is_relative else None
        losses, found = loss_of(token_logps(hidden, head, targets), log_squares, slice(None), slice(None))
        return losses.sum(), found.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        matrix, bias = head.linear.weight, head.linear.bias
        return _FusedLoss.apply(hidden, matrix, bias, targets, lengths, loss_of, is_relative, head, dtype)  # type: ignore[return-value]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, lengths, loss_of, is_relative, lm_head, dtype):
        head = _Head(hidden, weight, bias, targets, lm_head, dtype, ctx.needs_input_grad)
        size, rows_of = rows_per_chunk(len(weight), hidden.device), lengths[:, 1:].sum(1).tolist()
        total, returned, stop = 0, [], 0
        for items in chunk_by_size(rows_of, size):
            start, stop = stop, stop + sum(rows_of[items])
            chunks = [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
            scored = [(head.score(chunk), head.log_squares(chunk) if is_relative else None) for chunk in chunks]
            logps = torch.cat([found for found, _ in scored])
            log_squares = torch.cat([found for _, found in scored]) if is_relative else None  # type: ignore[misc]
            with torch.enable_grad():
                logps.requires_grad_()
                losses, found = loss_of(logps, log_squares, slice(start, stop), items)
                loss = losses.sum()
                (derivative,) = torch.autograd.grad(loss, logps)
            for chunk in reversed(chunks):  # the buffer still holds the softmax of the last chunk
                if chunk != chunks[-1]:
                    head.score(chunk)
                head.add_gradient(chunk, derivative[chunk.start - start : chunk.stop - start])
            total = total + loss.detach()
            returned.append(found.detach())
        grads = zip((hidden, weight, bias), (head.hidden_grad, head.weight_grad, head.bias_grad), strict=True)
        ctx.save_for_backward(*(grad if grad is None else grad.to(of.dtype) for of, grad in grads))
        returned = torch.cat(returned)
        ctx.mark_non_differentiable(returned)
        return total, returned

    @staticmethod
    def backward(ctx, grad, _):
        return *(saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), *[None] * 6


class _Head:
    """The LM head on one chunk of logits at a time, in a shared buffer; accumulates the gradients of its inputs."""

    def __init__(self, hidden, weight, bias, targets, lm_head: LMHead, dtype, needs_grad) -> None:
        self.hidden, self.weight, self.targets = hidden.detach().to(dtype), weight.detach().to(dtype), targets
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.scale, self.softcap = lm_head.scale, lm_head.softcap
        needs_hidden, needs_weight, needs_bias, *_ = needs_grad
        exact = torch.promote_types(dtype, torch.float32)
        self.hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        self.weight_grad = torch.empty_like(weight, dtype=exact) if needs_weight else None
        self.bias_grad = torch.zeros_like(bias, dtype=exact) if bias is not None and needs_bias else None
        self.started = False  # whether weight_grad is initialised
        rows = min(rows_per_chunk(len(weight), hidden.device), len(targets))
        self.probabilities = torch.empty(rows, len(weight), dtype=exact, device=hidden.device)
        self.logits = self.probabilities if dtype == exact else torch.empty_like(self.probabilities, dtype=dtype)
        self.slopes = torch.empty_like(
            self.probabilities if self.softcap is not None else hidden[:0]
        )  # of the soft-cap

    def score(self, chunk: slice) -> Tensor:
        """Return the log-probabilities of the chunk's targets; leave its softmax in `probabilities`."""
        hidden, targets = self.hidden[chunk], self.targets[chunk, None]
        logits, probabilities = self.logits[: len(hidden)], self.probabilities[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        if self.logits is not self.probabilities:
            probabilities.copy_(logits)
        if self.scale != 1:
            probabilities *= self.scale
        if self.softcap is not None:
            probabilities.div_(self.softcap).tanh_()
            torch.square(probabilities, out=self.slopes[: len(hidden)]).neg_().add_(1)
            probabilities *= self.softcap
        highest = probabilities.amax(-1, keepdim=True)
        shifted = probabilities.gather(1, targets) - highest
        torch.softmax(probabilities, -1, out=probabilities)
        return (shifted + probabilities.amax(-1, keepdim=True).log())[:, 0]  # the highest has probability 1 / sum

    def log_squares(self, chunk: slice) -> Tensor:
        """Return log sum_v p(v)^2 of the chunk scored last."""
        return 2 * torch.linalg.vector_norm(self.probabilities[: len(self.hidden[chunk])], dim=-1).log()

    def add_gradient(self, chunk: slice, derivative: Tensor) -> None:
        """Add the gradients of the chunk scored last; derivative [rows]: of the loss by each log-probability."""
        hidden, targets = self.hidden[chunk], self.targets[chunk, None]
        logits, residual = self.logits[: len(hidden)], self.probabilities[: len(hidden)]
        residual.scatter_add_(1, targets, residual.new_full(targets.shape, -1.0))  # d logp / d logits, negated
        if self.softcap is not None:
            residual *= self.slopes[: len(hidden)]
        if self.logits is not self.probabilities:
            logits.copy_(residual)
        derivative = (-self.scale * derivative)[:, None]
        if self.bias_grad is not None:
            self.bias_grad += residual.T @ derivative[:, 0]
        if self.hidden_grad is not None:
            of_hidden = product(logits, self.weight, self.hidden_grad.dtype)
            torch.mul(of_hidden, derivative, out=self.hidden_grad[chunk])
        if self.weight_grad is not None:
            scaled = (hidden * derivative).to(logits.dtype)
            add_product(self.weight_grad, logits.T, scaled, beta=float(self.started))
            self.started = True
