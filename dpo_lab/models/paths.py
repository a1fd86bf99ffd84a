"""The paths of a forward pass: a packed stream with shared prompts, or padded rows; each with or without all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_lab.core.lm_head import LMHead
from dpo_lab.core.logps import StreamRows, pad_rows, predicting_rows, stream_rows
from dpo_lab.core.pairs import to_device
from dpo_lab.models.attention import SHARED_PROMPT, Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that a path was selected for; a model whose config changes in one of them has to be tried again.
WATCHED = ("sliding_window", "use_sliding_window", "layer_types", "rope_parameters", "final_logit_softcapping")


@dataclass(frozen=True)
class ForwardPath:
    """How a model computes log-probabilities, as plain values: found by trial.py, and applied to any copy of the model.

    shares_prompts: by a packed stream, else by padded rows. vocabulary: number of logits of the LM head, which is applied
    to response rows alone, in chunks; None if the model has to return logits of all rows. scale, softcap: see LMHead.
    longest: number of tokens from which on a row gets a forward pass of its own, since its position embedding would depend
    on the longest row of the batch; None if it never does. why: the reasons, for the log.
    """

    shares_prompts: bool = False
    vocabulary: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    longest: int | None = None
    why: str = ""


def causal_lm(model) -> PreTrainedModel:
    """Return the Hugging Face model, unwrapped from its adapter if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pad_id_of(model: PreTrainedModel) -> int:
    """Return the token id for padding; any valid id would do, since padding is not scored."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    pad_id = getattr(causal_lm(model).config.get_text_config(), "pad_token_id", None) or 0
    return pad_id if 0 <= pad_id < rows else 0


def has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Return whether an adapter puts virtual tokens before the prompt."""
    return any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values())


def apply_path(model: PreTrainedModel, path: ForwardPath) -> None:
    """Let the model, and copies of it, take a path."""
    bare = causal_lm(model)
    if path.shares_prompts:
        bare.set_attn_implementation(SHARED_PROMPT)
    vars(bare).update(forward_path=path, watched=_watched(bare))


def path_of(model: PreTrainedModel) -> ForwardPath:
    """Return the path that the model takes: padded rows with all logits if none was applied.

    Without the attention for packed streams it takes padded rows too. Raises RuntimeError if the model was changed since.
    """
    bare = causal_lm(model)
    path: ForwardPath = getattr(bare, "forward_path", ForwardPath())
    if path.shares_prompts and bare.config._attn_implementation != SHARED_PROMPT:
        path = replace(path, shares_prompts=False)
    now = _watched(bare)
    changed = [f"{name}={now[name]}" for name, was in getattr(bare, "watched", now).items() if now[name] != was]
    if path.vocabulary is not None and has_virtual_tokens(model):
        changed.append("an adapter with virtual tokens")
    if changed:
        raise RuntimeError(
            f"the model was changed after its path was selected: {', '.join(changed)}; call select_forward(model) last"
        )
    return path


def shares_prompts(model: PreTrainedModel) -> bool:
    """Return whether the model takes packed streams."""
    return path_of(model).shares_prompts


def response_rows(
    model: PreTrainedModel, tokens: Tensor, lengths: np.ndarray, path: ForwardPath | None = None
) -> tuple[Tensor, LMHead, Tensor]:
    """Return the hidden states [R, H] of the rows that predict response tokens, the LM head, and these tokens.

    They are in the order of the stream. Where the model has to return all logits, these take the place of hidden states.
    path: the one to take, else that of the model.
    """
    path = path or path_of(model)
    stream = stream_rows(tokens, lengths, keeps_last=False)
    if path.longest is not None and (lengths[:, :1] + lengths[:, 1:]).max() > path.longest:
        rows = _alone(model, tokens, lengths, path, lambda ids: _rows(model, ids, path), predicts_next=True)
    elif path.shares_prompts:
        rows = _packed(model, stream).index_select(0, stream.rows)
    else:
        input_ids, _ = pad_rows(tokens, lengths, pad_id=pad_id_of(model))
        places = to_device(torch.from_numpy(predicting_rows(lengths)), tokens.device)
        rows = _rows(model, input_ids, path).flatten(0, 1).index_select(0, places)
    if path.vocabulary is None:
        return rows, LMHead(nn.Identity(), rows.shape[-1]), stream.targets
    head: Any = causal_lm(model).get_output_embeddings()
    if head.weight.is_floating_point():
        rows = rows.to(head.weight.dtype)
    return rows, LMHead(head, path.vocabulary, path.scale, path.softcap), stream.targets


def last_rows(model: PreTrainedModel, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """Return the hidden states [B, K, H] of the last token of each response; for `tokens` and `lengths` see pad_rows.

    Every response has to have a token.
    """
    path, items, responses = path_of(model), len(lengths), lengths.shape[1] - 1
    if path.longest is not None and (lengths[:, :1] + lengths[:, 1:]).max() > path.longest:
        rows = _alone(model, tokens, lengths, path, lambda ids: _hidden(model, ids), predicts_next=False)
        return rows.view(items, responses, -1)
    if path.shares_prompts:
        places = lengths.ravel().cumsum().reshape(lengths.shape)[:, 1:] - 1
        rows = _packed(model, stream_rows(tokens, lengths))
    else:
        input_ids, _ = pad_rows(tokens, lengths, pad_id=pad_id_of(model))
        first = np.arange(items * responses).reshape(responses, items).T * input_ids.shape[1]  # of each row, flattened
        places = first + lengths[:, :1] + lengths[:, 1:] - 1
        rows = _hidden(model, input_ids).flatten(0, 1)
    wanted = to_device(torch.from_numpy(places.ravel()), tokens.device)
    return rows.index_select(0, wanted).view(items, responses, -1)


def _packed(model: PreTrainedModel, stream: StreamRows) -> Tensor:
    """Return the hidden states [N, H] of a packed stream."""
    output = _body(model)(
        input_ids=stream.tokens[None],
        position_ids=stream.positions[None],
        attention_mask=stream.tokens.new_ones(1, 1, 1, 1),  # transformers builds none, and passes this to the attention
        use_cache=False,
        segments=Segments(stream.lengths.tolist()),
    )
    return output.last_hidden_state[0]


def _rows(model: PreTrainedModel, input_ids: Tensor, path: ForwardPath) -> Tensor:
    """Return the hidden states [B, T, H] of rows of tokens, or their logits if the model has to compute these itself."""
    if path.vocabulary is None:
        return model(input_ids=input_ids, use_cache=False).logits
    return _hidden(model, input_ids)


def _hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the hidden states [B, T, H] of rows of tokens."""
    return _body(model)(input_ids=input_ids, use_cache=False).last_hidden_state


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the model without its LM head."""
    bare = causal_lm(model)
    return bare.base_model if bare.base_model is not bare else bare.model  # where base_model_prefix names no module


def _alone(
    model: PreTrainedModel,
    tokens: Tensor,
    lengths: np.ndarray,
    path: ForwardPath,
    rows_of: Callable[[Tensor], Tensor],
    predicts_next: bool,
) -> Tensor:
    """Return rows_of(tokens [1, T]) by one forward pass per response: those that predict its tokens, or its last one."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError(
            f"rows of more than {path.longest} tokens need a forward pass each, since the model's position embedding"
            f" depends on the longest row, which a sharded model can't do; type data.max_length={path.longest}"
        )
    found, parts = [], iter(tokens.split(lengths.ravel().tolist()))
    for item in lengths.tolist():
        prompt = next(parts)
        for response in item[1:]:
            _reset_rope(model)
            rows = rows_of(torch.cat((prompt, next(parts)))[None])[0]
            found.append(rows[len(prompt) - 1 : len(prompt) + response - 1] if predicts_next else rows[-1:])
    return torch.cat(found)


def _reset_rope(model: PreTrainedModel) -> None:
    """Undo what earlier rows did to dynamic position embeddings, which keep the frequencies of the longest one."""
    for module in model.modules():
        for name, original in list(module.named_buffers(recurse=False)):
            prefix = name.removesuffix("original_inv_freq")
            if prefix != name and hasattr(module, "max_seq_len_cached"):
                setattr(module, f"{prefix}inv_freq", original.clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _watched(bare: PreTrainedModel) -> dict[str, Any]:
    config = bare.config.get_text_config()
    return {name: getattr(config, name, None) for name in WATCHED}
