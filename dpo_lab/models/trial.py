"""Try the forward paths on a loaded model and made-up tokens: each is taken if it gives what the model itself gives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_lab.models.attention import SHARED_PROMPT, shared_prompt_attention
from dpo_lab.models.paths import ForwardPath, causal_lm, has_virtual_tokens, path_of, response_rows
from dpo_lab.models.probes import (
    error_line,
    evaluated,
    fingerprint,
    made_up_tokens,
    positions_of,
    relative_differences,
    ropes_of,
)
from dpo_lab.models.sharding import device_of
from dpo_lab.runs.cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "1"  # increase it when a change of the code changes the cached results
RESPONSES = ((1, 3, 2), (2, 1, 3))  # lengths of the responses to a long prompt and to one of one token
PROMPT, LONGEST = 7, 40  # length of the long prompt, and the longest if a sliding window calls for more
SHARED_LAYERS = {"full_attention", "sliding_attention"}  # types of layers that a packed stream can have
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")  # names in configs
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The largest difference by rounding, relative to the standard deviation of the logits: of any token in float32, and of the
# median token in 16 bits, where a token may be routed to another expert.
EXACT, ROUNDED = 1e-4, 0.1


def path_for(
    model: PreTrainedModel,
    cache: Path | None = None,
    device: torch.device | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> ForwardPath:
    """Return the path for a model on `device` (its own if None) under `context` (autocast), which it is tried in.

    cache: folder of the results of earlier trials. For a trial the model is moved to the device, and then back.
    """
    device = device or model.device
    if cache is None:
        return _on(model, device, context)

    def make(path: Path) -> None:
        path.write_text(json.dumps(asdict(_on(model, device, context))))

    with context():
        where = [FORMAT, device.type, str(compute_dtype(device)), causal_lm(model).config._attn_implementation]
    if device.type == "cuda":
        where.append(torch.cuda.get_device_name(device))
    return ForwardPath(**json.loads(cached(cache / f"forward-{fingerprint(model, where)}.json", make).read_text()))


def _on(model: PreTrainedModel, device: torch.device, context: Callable[[], AbstractContextManager]) -> ForwardPath:
    home = model.device
    model.to(device)  # type: ignore[arg-type]
    try:
        with context():
            return try_paths(model)
    finally:
        model.to(home)  # type: ignore[arg-type]


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a matrix product of float32 matrices, which autocast may change."""
    return (torch.empty(1, 1, device=device) @ torch.empty(1, 1, device=device)).dtype


def draws_exactly(model: PreTrainedModel) -> bool:
    """Return whether no forward pass finds other log-probabilities, beyond rounding of float32, than those that the model's
    samples were drawn with: 16 bits round otherwise, and some position embeddings depend on a batch's longest row. To be
    called under the autocast context of passes.
    """
    is_exact = compute_dtype(device_of(model)) is torch.float32 and model.dtype is torch.float32
    return is_exact and path_of(model).longest is None


@torch.no_grad()
def try_paths(model: PreTrainedModel) -> ForwardPath:
    """Return the path that the model takes where it is, trying first those of less memory and time."""
    name = type(causal_lm(model)).__name__
    if has_virtual_tokens(model):
        return ForwardPath(why=f"padded rows for {name}, because its adapter puts virtual tokens before the prompt")
    path = ForwardPath(longest=_longest(model))
    with evaluated(model), _recorded(causal_lm(model)) as (windows, masks):
        items = _Items.made_up(model)
        items = replace(items, logits=response_rows(model, items.tokens, items.lengths, path)[0])
        path, head = _with_head(model, items, path)
        path, reason = _with_shared_prompts(model, items, path, windows, masks)
    rows = "shared prompts" if path.shares_prompts else "padded rows"
    why = f"{rows} for {name}, {'without padding' if path.shares_prompts else 'because'} {reason}; {head}"
    if path.longest is not None:
        why += (
            f"; rows of more than {path.longest} tokens get a pass each: its position embedding depends on the longest"
        )
    return replace(path, why=why)


@dataclass(frozen=True)
class _Items:
    """Made-up tokens, as a packed stream, and the logits [R, V] of the rows that predict its response tokens."""

    tokens: Tensor
    lengths: np.ndarray
    logits: Tensor
    is_exact: bool  # whether the logits are computed in float32 or higher

    @classmethod
    def made_up(cls, model: PreTrainedModel) -> _Items:
        config = causal_lm(model).config.get_text_config()
        window = getattr(config, "sliding_window", None) or 0
        prompt = max(PROMPT, min(window + 3, LONGEST, (positions_of(model) or LONGEST) - max(RESPONSES[0])))
        lengths = np.array([(prompt, *RESPONSES[0]), (1, *RESPONSES[1])])
        weight = torch.empty(1, 1, dtype=model.dtype, device=model.device)
        is_exact = (weight @ weight).dtype in (torch.float32, torch.float64)
        is_exact &= model.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
        return cls(made_up_tokens(model, int(lengths.sum())), lengths, torch.empty(0), is_exact)

    def first(self, responses: int) -> _Items:
        """Return the items with their first responses alone."""
        parts = self.tokens.split(self.lengths.ravel().tolist())
        rows = self.logits.split(self.lengths[:, 1:].ravel().tolist())
        count = self.lengths.shape[1]
        tokens = torch.cat([part for i, part in enumerate(parts) if i % count <= responses])
        logits = torch.cat([part for i, part in enumerate(rows) if i % (count - 1) < responses])
        return replace(self, tokens=tokens, lengths=self.lengths[:, : 1 + responses], logits=logits)

    def compare(self, model: PreTrainedModel, path: ForwardPath) -> tuple[float, bool]:
        """Return the relative difference of a path's logits from these, and whether it is due to rounding."""
        hidden, head, _ = response_rows(model, self.tokens, self.lengths, path)
        differences = relative_differences(head(hidden), self.logits)
        difference = float(differences.max() if self.is_exact else differences.median())
        return difference, difference <= (EXACT if self.is_exact else ROUNDED)


def _with_head(model: PreTrainedModel, items: _Items, path: ForwardPath) -> tuple[ForwardPath, str]:
    """Return the path with the LM head that gives the model's logits from its hidden states, if there is one."""
    reason = ""
    for scale, softcap in _heads(causal_lm(model).config.get_text_config()):
        candidate = replace(path, vocabulary=items.logits.shape[-1], scale=scale, softcap=softcap)
        try:
            difference, agrees = items.compare(model, candidate)
        except Exception as error:  # any type
            reason = error_line(error)
            continue
        if agrees:
            return candidate, "its LM head is applied to response tokens alone"
        reason = (
            f"its LM head gives other logits from its hidden states (by {difference:.1g} of their standard deviation)"
        )
    return path, f"all logits are held, because {reason}"


def _heads(config: Any) -> Iterator[tuple[float, float | None]]:
    """Return the scales and soft-caps of logits that a config may mean; first those that small logits would hide."""
    declared = {getattr(config, name, None) or 1.0 for name in SCALES} - {1.0}
    scales = [*(value for scale in declared for value in (scale, 1 / scale)), 1.0]
    softcaps = {getattr(config, name, None) or None for name in SOFTCAPS} - {None}
    return itertools.product(scales, [*softcaps, None])


def _with_shared_prompts(
    model: PreTrainedModel,
    items: _Items,
    path: ForwardPath,
    windows: list[int | None],
    masks: list[tuple[int | None, bool]],
) -> tuple[ForwardPath, str]:
    """Return the path with shared prompts if these give the logits of padded rows, and why it has them or not.

    windows: the sliding windows that the attention of shared prompts was called with; masks: the windows that
    transformers' masks for padded rows were made with, and whether it made them from other functions than its own.
    """
    bare = causal_lm(model)
    was = bare.config._attn_implementation
    if path.vocabulary is None:
        return path, "it needs all logits"
    if was not in ("sdpa", "eager", SHARED_PROMPT):
        return path, f"its attention is {was}"
    if getattr(bare.config, "reorder_and_upcast_attn", False):
        return path, "it computes attention scores in its own way (reorder_and_upcast_attn)"
    if not bare._can_set_attn_implementation():
        return path, "its attention is not a function that transformers can replace"
    if others := set(getattr(bare.config.get_text_config(), "layer_types", None) or ()) - SHARED_LAYERS:
        return path, f"it has layers of {', '.join(sorted(others))}"
    shared = replace(path, shares_prompts=True)
    try:
        bare.set_attn_implementation(SHARED_PROMPT)
        found = [each.compare(model, shared) for each in (items, items.first(1))]
        if was == "eager":  # from then on rows with padding, and sampling, take SDPA's attention
            found.append(items.compare(model, path))
    except Exception as error:  # any type
        return path, error_line(error).removeprefix("TypeError: ")  # the attention's own word
    finally:
        bare.set_attn_implementation(was)
    if not windows:
        return path, "it does not call the attention that was set"
    of_layers, of_masks = ({size for size in sizes if size} for sizes in (windows, (size for size, _ in masks)))
    if of_layers != of_masks or any(is_other for _, is_other in masks):
        return path, f"its layers have attention windows {of_layers or 'without limit'}, its masks other ones"
    said = f"its logits differ by {max(found)[0]:.1g} of their standard deviation from those of padded rows"
    return (shared, f"({said})") if all(agrees for _, agrees in found) else (path, said)


@contextmanager
def _recorded(bare: PreTrainedModel) -> Iterator[tuple[list[int | None], list[tuple[int | None, bool]]]]:
    """Record the windows of calls to the attention of shared prompts, and of the masks for the model's own attention."""
    windows: list[int | None] = []
    masks: list[tuple[int | None, bool]] = []
    kind = bare.config._attn_implementation
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(kind, sdpa_mask)

    def attend(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        windows.append(sliding_window)
        return shared_prompt_attention(*args, sliding_window=sliding_window, **kwargs)

    def mask(*args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> Any:
        masks.append((local_size, use_vmap))
        return make_mask(*args, local_size=local_size, use_vmap=use_vmap, **kwargs)

    ALL_ATTENTION_FUNCTIONS[SHARED_PROMPT], ALL_MASK_ATTENTION_FUNCTIONS[kind] = attend, mask
    try:
        yield windows, masks
    finally:
        del ALL_ATTENTION_FUNCTIONS[SHARED_PROMPT], ALL_MASK_ATTENTION_FUNCTIONS[kind]


def _longest(model: PreTrainedModel) -> int | None:
    """Return the length from which on rows change the angles of the model's rotary position embeddings, if they do."""
    declared = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", 0)
    found = [
        int(rope.get("original_max_position_embeddings") or declared)
        for rope in ropes_of(model)
        if "dynamic" in rope["rope_type"] or rope["rope_type"] == "longrope"
    ]
    return min(found, default=None)
