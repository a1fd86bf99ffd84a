"""The forward pass: log-probabilities of responses, on the shared-prompt path where it is proven, else on padded rows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.core.fused_lm_head import fused_loss, token_logps
from dpo_lab.core.logps import StreamRows, pad_rows, sequence_logps, stream_rows, sum_responses
from dpo_lab.core.losses import Loss
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.models.attention import SHARED_PROMPT, Segments
from dpo_lab.models.sharding import class_of, device_of, one_pass

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Architectures that tests/models/test_shared_prompt.py compares with the padded path; subclasses are not included.
PROVEN = {
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Olmo2ForCausalLM",
    "SmolLM3ForCausalLM",
    "Phi3ForCausalLM",
}
ROPES = {"default", "linear", "llama3", "yarn"}  # angles depend only on a token's position


def select_forward(model: PreTrainedModel) -> None:
    """Switch the model to the shared-prompt path if it supports it; log which path it takes and why."""
    kind = class_of(causal_lm(model)).__name__
    if reason := why_not_shared(model):
        log.info("forward: padded rows for %s, because %s", kind, reason)
    else:
        causal_lm(model).set_attn_implementation(SHARED_PROMPT)
        log.info("forward: shared prompts for %s, without padding", kind)


def forward_name(model: PreTrainedModel) -> str:
    """Return the name of the path that the model takes, which is part of its numerics."""
    return "shared prompt" if _shares_prompts(model) else "padded"


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Return why the model can't take the shared-prompt path, from its class, modules and config; None if it can."""
    bare = causal_lm(model)
    config, kind = bare.config, class_of(bare)
    if kind.__name__ not in PROVEN or not kind.__module__.startswith("transformers."):
        return "this architecture is not among the tested ones"
    if config._attn_implementation not in ("sdpa", "eager", SHARED_PROMPT):
        return f"its attention is {config._attn_implementation}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "not all its layers have full attention"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it has a sliding attention window of {config.sliding_window} tokens"
    rope = getattr(config, "rope_parameters", None) or {}
    if (rope_type := rope.get("rope_type", "default")) not in ROPES:
        return f"its position embedding ({rope_type}) depends on the length of the whole stream"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "it computes attention scores in its own way (reorder_and_upcast_attn)"
    head = bare.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return "its LM head is not a plain matrix"
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before the prompt"
    return None


def causal_lm(model) -> PreTrainedModel:
    """Return the Hugging Face model, unwrapped from its adapter if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pad_id_of(model: PreTrainedModel) -> int:
    """Return the token id for padding; any valid id would do, since padding is not scored."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    pad_id = getattr(causal_lm(model).config.get_text_config(), "pad_token_id", None) or 0
    return pad_id if 0 <= pad_id < rows else 0


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
    model: PreTrainedModel, tokens: Int[Tensor, " tokens"], lengths: Int[Tensor, "items parts"]
) -> Float[Tensor, "items parts-1"]:
    """Return the log-probabilities, in nats, of each item's responses given its prompt; differentiable.

    tokens: a packed stream of prompts and responses; lengths: of each part; see core/logps.py.
    """
    if _shares_prompts(model):
        hidden, weight, stream = _response_rows(model, tokens, lengths)
        return sum_responses(token_logps(hidden, weight, stream.targets), lengths)
    input_ids, labels = pad_rows(tokens, lengths, pad_id=pad_id_of(model))
    sums, _ = sequence_logps(model(input_ids=input_ids, use_cache=False).logits, labels)
    return sums.view(-1, len(lengths)).T


def pair_logps(model: PreTrainedModel, batch: PairBatch) -> PairLogps:
    """Return the log-probabilities of both responses of every pair, by one forward pass of any causal LM."""
    return PairLogps.of(response_logps(model, batch.tokens, batch.lengths), batch.lengths)


@one_pass
def pair_loss(
    model: PreTrainedModel, batch: PairBatch, loss: Loss, reference: PairLogps
) -> tuple[Float[Tensor, ""], PairLogps]:
    """Return the sum of a batch's losses, differentiable, and the policy's log-probabilities, detached."""
    if _shares_prompts(model):
        hidden, weight, stream = _response_rows(model, batch.tokens, batch.lengths)

        def loss_of(logps: Tensor, pairs: slice) -> Tensor:
            return loss(PairLogps.of(logps, batch.lengths[pairs]), reference[pairs])

        total, logps = fused_loss(hidden, weight, stream.targets, batch.lengths, loss_of)
        return total, PairLogps.of(logps, batch.lengths)
    policy = pair_logps(model, batch)
    return loss(policy, reference).sum(), policy.detach()


@one_pass
def response_nll(
    model: PreTrainedModel, tokens: Int[Tensor, " tokens"], lengths: Int[Tensor, "items 2"]
) -> Float[Tensor, ""]:
    """Return the negative log-likelihood, in nats, summed over all response tokens of a stream; differentiable.

    For `tokens` and `lengths` see response_logps.
    """
    if _shares_prompts(model):
        hidden, weight, stream = _response_rows(model, tokens, lengths)
        return fused_loss(hidden, weight, stream.targets, lengths, lambda logps, _: -logps.sum(1))[0]
    return -response_logps(model, tokens, lengths).sum()


def dummy_nll(model: PreTrainedModel) -> Float[Tensor, ""]:
    """Return response_nll of a response of one token, for a pass that other ranks need."""
    tokens = torch.zeros(2, dtype=torch.long, device=device_of(model))
    return response_nll(model, tokens, torch.ones_like(tokens)[None])


def _shares_prompts(model: PreTrainedModel) -> bool:
    return causal_lm(model).config._attn_implementation == SHARED_PROMPT


def _response_rows(model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, StreamRows]:
    """Return the hidden states [R, H] of the rows that predict response tokens, the LM head [V, H], and these rows."""
    if reason := why_not_shared(model):
        raise RuntimeError(
            f"the model was changed after its path was selected: {reason}; call select_forward(model) last"
        )
    bare = causal_lm(model)
    stream = stream_rows(tokens, lengths)
    output = bare.base_model(
        input_ids=tokens[None],
        position_ids=stream.positions[None],
        attention_mask=tokens.new_ones(1, 1, 1, 1),  # transformers passes on a mask of four dimensions and builds none
        use_cache=False,
        segments=Segments(lengths.tolist()),
    )
    head: nn.Linear = bare.get_output_embeddings()  # type: ignore[assignment]
    return output.last_hidden_state[0].index_select(0, stream.rows), head.weight, stream
