"""Next-token logits of growing rows: with a KV cache where it is right, else by a full forward per step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dpo_lab.core.pairs import Tokens
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.sharding import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rows(Protocol):
    """A batch of token rows that grow by one token per step."""

    def logits(self) -> Tensor:
        """Return logits [B, V] of each row's next token; to be called once per step."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Add one token [B] to each row."""
        ...


def rows_of(
    model: PreTrainedModel, prompts: Sequence[Tokens], pad_id: int, new_tokens: int, shares_prompts: bool = False
) -> Rows:
    """Return rows that start with the prompts and can grow by `new_tokens`.

    shares_prompts: whether equal prompts run through the model once, where it has a cache.
    """
    if not uses_cache(model):
        return FullRows(model, prompts)
    if not shares_prompts:
        return CachedRows(model, prompts, pad_id, new_tokens)
    rows = [tuple(map(int, prompt)) for prompt in prompts]
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(rows))}
    cached = CachedRows(model, list(places), pad_id, new_tokens)
    cached.copies = torch.tensor([places[row] for row in rows], device=device_of(model))
    return cached


def uses_cache(model: PreTrainedModel) -> bool:
    """Return whether the model is sampled with a KV cache."""
    return not getattr(causal_lm(model), "samples_without_cache", False)


def sample_without_cache(model: PreTrainedModel) -> None:
    """Mark the model, and copies of it, to be sampled without a KV cache."""
    causal_lm(model).samples_without_cache = True  # type: ignore[assignment]


class FullRows:
    """Rows without a cache: each step runs the full rows, batched by length without padding; right for any causal
    model.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tokens]) -> None:
        self.model = model
        self.device = device_of(model)
        self.rows = [torch.tensor(list(prompt), device=self.device) for prompt in prompts]
        accepted = inspect.signature(causal_lm(model).forward).parameters
        self.settings = {"use_cache": False} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})

    def logits(self) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(i)
        result: list[Tensor] = [torch.empty(0)] * len(self.rows)
        for indices in by_length.values():
            logits = self.model(input_ids=torch.stack([self.rows[i] for i in indices]), **self.settings).logits[:, -1]
            for i, row in zip(indices, logits, strict=True):
                result[i] = row
        return torch.stack(result)

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def append(self, tokens: Tensor) -> None:
        self.rows = [torch.cat((row, token[None])) for row, token in zip(self.rows, tokens, strict=True)]


class CachedRows:
    """Rows with a KV cache, padded on the left; each step runs only the newest token.

    copies: if set, there are as many rows from the first step on, of which row i continues prompt copies[i].
    """

    copies: Tensor | None = None

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tokens], pad_id: int, new_tokens: int) -> None:
        device = device_of(model)
        width = max(len(p) for p in prompts)
        self.model = model
        self.input_ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([width - len(p) for p in prompts], device=device)
        real = torch.arange(width, device=device)[None, :] >= padding[:, None]
        # without padding no mask is needed besides the model's causal one
        self.mask = real.long() if bool(padding.any()) else None
        self.position = (torch.arange(width, device=device)[None, :] - padding[:, None]).clamp(min=0)
        self.cache = _growing_cache(model, width + new_tokens)
        accepted = inspect.signature(causal_lm(model).forward).parameters
        # recurrent models name their cache cache_params, and ignore positions
        self.cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"

    def logits(self) -> Tensor:
        logits = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits[:, -1]
        if (copies := self.copies) is None:
            return logits
        self.copies = None
        self.keep(copies)
        return logits[copies]

    def keep(self, rows: Tensor) -> None:
        # a method that attention layers and layers with recurrent states both have
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.position = self.position[rows]
        self.mask = self.mask[rows] if self.mask is not None else None

    def append(self, tokens: Tensor) -> None:
        self.input_ids, self.position = tokens[:, None], self.position[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), 1)


def _growing_cache(model: PreTrainedModel, length: int) -> Cache:
    """Return a cache preallocated for `length` tokens if all layers have full attention, else transformers' default."""
    config = causal_lm(model).config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None):
        return DynamicCache(config=config)
    return Cache(layers=[_PreallocatedLayer(length) for _ in range(config.num_hidden_layers)])


class _PreallocatedLayer(DynamicLayer):
    """A DynamicLayer with preallocated memory: a new token is written in place instead of copying the cache."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, key_size = key_states.shape
            self.key_buffer = key_states.new_empty(batch, heads, self.length, key_size)
            self.value_buffer = value_states.new_empty(batch, heads, self.length, value_states.shape[-1])
            self.filled = 0
        end = self.filled + key_states.shape[-2]
        self.key_buffer[:, :, self.filled : end] = key_states
        self.value_buffer[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            raise RuntimeError("the model does not write to the cache that is passed to it")
        rows, old = len(beam_idx), (self.key_buffer, self.value_buffer)
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
        if rows > len(self.key_buffer):
            self.key_buffer, self.value_buffer = (each.new_empty(rows, *each.shape[1:]) for each in old)
            moved = torch.arange(rows, device=beam_idx.device)
        for buffer, source in zip((self.key_buffer, self.value_buffer), old, strict=True):
            buffer[moved, :, : self.filled] = source[beam_idx[moved], :, : self.filled]
        self.key_buffer, self.value_buffer = self.key_buffer[:rows], self.value_buffer[:rows]
        self.keys, self.values = self.key_buffer[:, :, : self.filled], self.value_buffer[:, :, : self.filled]
