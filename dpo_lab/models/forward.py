"""The forward pass: log-probabilities of responses, and losses of them, on the path that was selected for the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.core.fused_lm_head import (
    fused_loss,
    fused_token_loss,
    relative_sums,
    token_log_squares,
    token_logps,
)
from dpo_lab.core.logps import sum_responses
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.core.rollouts import Rollouts
from dpo_lab.models.paths import apply_path, response_rows, shares_prompts
from dpo_lab.models.sharding import device_of, one_pass
from dpo_lab.models.trial import path_for

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def select_forward(
    model: PreTrainedModel,
    cache: Path | None = None,
    device: torch.device | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Let the model take the path that path_for returns for it, and log which and why."""
    path = path_for(model, cache, device, context)
    apply_path(model, path)
    log.info("forward: %s", path.why)


def forward_name(model: PreTrainedModel) -> str:
    """Return the name of the path that the model takes, which is part of its numerics."""
    return "shared prompt" if shares_prompts(model) else "padded"


def disable_dropout(model: nn.Module) -> None:
    """Switch to evaluation mode, but keep gradient checkpointing working if it is enabled."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = (
                True  # transformers checkpoints only layers in train mode; their submodules stay in eval mode
            )
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


@one_pass
def response_logps(
    model: PreTrainedModel,
    tokens: Int[Tensor, " tokens"],
    lengths: Int[np.ndarray, "items parts"],
    weights: Float[Tensor, " response_tokens"] | None = None,
) -> Float[Tensor, "items parts-1"]:
    """Return the log-probabilities, in nats, of each item's responses given its prompt; differentiable.

    tokens: a packed stream of prompts and responses; lengths: of each part; weights: of each response token, None for 1;
    see core/logps.py.
    """
    hidden, head, targets = response_rows(model, tokens, lengths)
    return sum_responses(token_logps(hidden, head, targets), lengths, weights)


@one_pass
def pair_logps(model: PreTrainedModel, batch: PairBatch, weighs_pairs: bool = False) -> PairLogps:
    """Return the log-probabilities of both responses of every pair, by one forward pass of any causal LM.

    weighs_pairs: with the weight of each pair, see PairLogps.of.
    """
    hidden, head, targets = response_rows(model, batch.tokens, batch.lengths)
    log_squares = token_log_squares(hidden, head) if weighs_pairs else None
    sums = relative_sums(token_logps(hidden, head, targets), log_squares, batch.lengths, batch.weights)
    return PairLogps.of(sums, batch.response_lengths)


@one_pass
def pair_loss(
    model: PreTrainedModel,
    batch: PairBatch,
    loss: Callable[[PairLogps, Any], Tensor],
    reference: Any,
    weighs_pairs: bool = False,
) -> tuple[Float[Tensor, ""], PairLogps]:
    """Return the sum of a batch's losses, differentiable, and the policy's log-probabilities, detached.

    loss: a Loss, or another function of the log-probabilities of pairs and of their part of `reference`. weighs_pairs:
    whether each loss is multiplied with the weight of its pair, see PairLogps.of.
    """
    hidden, head, targets = response_rows(model, batch.tokens, batch.lengths)

    def loss_of(logps: Tensor, pairs: slice) -> Tensor:
        policy = PairLogps.of(logps, batch.response_lengths[pairs])
        return policy.weigh(loss(policy, reference[pairs]))

    total, logps = fused_loss(hidden, head, targets, batch.lengths, loss_of, batch.weights, weighs_pairs)
    return total, PairLogps.of(logps, batch.response_lengths)


@one_pass
def response_nll(
    model: PreTrainedModel,
    tokens: Int[Tensor, " tokens"],
    lengths: Int[np.ndarray, "items 2"],
    weights: Float[Tensor, " response_tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Return the negative log-likelihood, in nats, summed over all response tokens of a stream; differentiable.

    For `tokens`, `lengths` and `weights` see response_logps.
    """
    hidden, head, targets = response_rows(model, tokens, lengths)
    return fused_loss(hidden, head, targets, lengths, lambda logps, _: -logps.sum(1), weights)[0]


@one_pass
def token_logps_of(
    model: PreTrainedModel, tokens: Int[Tensor, " tokens"], lengths: Int[np.ndarray, "items parts"]
) -> Float[Tensor, " response_tokens"]:
    """Return the log-probability, in nats, of each response token of a stream; see response_logps."""
    return token_logps(*response_rows(model, tokens, lengths))


@one_pass
def rollout_loss(
    model: PreTrainedModel, rollouts: Rollouts, loss: Callable[[Tensor, Rollouts], Tensor]
) -> tuple[Float[Tensor, ""], Float[Tensor, " response_tokens"]]:
    """Return the sum of the losses of rollouts, differentiable, and the policy's log-probabilities of tokens, detached.

    loss: a function of the log-probabilities of the response tokens of some prompts, and of the rollouts of these prompts.
    """
    hidden, head, targets = response_rows(model, rollouts.tokens, rollouts.lengths)

    def loss_of(logps: Tensor, _: Any, rows: slice, prompts: slice) -> tuple[Tensor, Tensor]:
        return loss(logps, rollouts.part(prompts, rows)), logps

    return fused_token_loss(hidden, head, targets, rollouts.lengths, loss_of)


def dummy_nll(model: PreTrainedModel) -> Float[Tensor, ""]:
    """Return response_nll of a response of one token, for a pass that other ranks need."""
    tokens = torch.zeros(2, dtype=torch.long, device=device_of(model))
    return response_nll(model, tokens, np.ones((1, 2), int))
