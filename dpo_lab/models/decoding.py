"""Next-token logits of growing rows: with a KV cache where it is right, else by a full forward per step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dpo_lab.core.pairs import Tokens
from dpo_lab.models.forward import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rows(Protocol):
    """Rows of tokens that grow by one token a step."""

    def logits(self) -> Tensor:
        """Logits [B, V] of each row's next token. To be called once a step."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone; their numbers rise."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Add one token [B] to each row."""
        ...


def rows_of(model: PreTrainedModel, prompts: Sequence[Tokens], pad_id: int, new_tokens: int) -> Rows:
    """Rows that begin with the prompts and have room for `new_tokens` more."""
    return CachedRows(model, prompts, pad_id, new_tokens) if uses_cache(model) else FullRows(model, prompts)


def uses_cache(model: PreTrainedModel) -> bool:
    """Whether its samples are drawn with a KV cache."""
    return not getattr(causal_lm(model), "samples_without_cache", False)


def sample_without_cache(model: PreTrainedModel) -> None:
    """Let samples of this model, and of its copies, be drawn by a full forward a step."""
    causal_lm(model).samples_without_cache = True  # type: ignore[assignment]


class FullRows:
    """Each step forwards whole rows, those of equal length together: no padding, no cache, right for every causal
    model.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tokens]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.rows = [torch.tensor(list(prompt), device=self.device) for prompt in prompts]
        takes = inspect.signature(causal_lm(model).forward).parameters
        self.settings = {"use_cache": False} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})

    def logits(self) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(place)
        found: list[Tensor] = [torch.empty(0)] * len(self.rows)
        for places in by_length.values():
            logits = self.model(input_ids=torch.stack([self.rows[i] for i in places]), **self.settings).logits[:, -1]
            for place, row in zip(places, logits, strict=True):
                found[place] = row
        return torch.stack(found)

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def append(self, tokens: Tensor) -> None:
        self.rows = [torch.cat((row, token[None])) for row, token in zip(self.rows, tokens, strict=True)]


class CachedRows:
    """Rows padded on the left; each step forwards the newest token alone."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tokens], pad_id: int, new_tokens: int) -> None:
        device = next(model.parameters()).device
        width = max(len(p) for p in prompts)
        self.model = model
        self.input_ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([width - len(p) for p in prompts], device=device)
        real = torch.arange(width, device=device)[None, :] >= padding[:, None]
        # without padding the model's causal attention is enough
        self.mask = real.long() if bool(padding.any()) else None
        self.position = (torch.arange(width, device=device)[None, :] - padding[:, None]).clamp(min=0)
        self.cache = _growing_cache(model, width + new_tokens)
        takes = inspect.signature(causal_lm(model).forward).parameters
        # recurrent models name their cache so, and take no positions
        self.cache_name = "cache_params" if "cache_params" in takes else "past_key_values"

    def logits(self) -> Tensor:
        return self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # what layers with keys and layers with recurrent states both know
        self.position = self.position[rows]
        self.mask = self.mask[rows] if self.mask is not None else None

    def append(self, tokens: Tensor) -> None:
        self.input_ids, self.position = tokens[:, None], self.position[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), 1)


def _growing_cache(model: PreTrainedModel, length: int) -> Cache:
    """A cache with room for `length` tokens where the model attends to everything; else the library's own choice."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None):
        return DynamicCache(config=config)
    return Cache(layers=[_RoomyLayer(length) for _ in range(config.num_hidden_layers)])


class _RoomyLayer(DynamicLayer):
    """DynamicLayer with its room reserved: a new token is written in place instead of copying the whole cache."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, key_size = key_states.shape
            self.room_keys = key_states.new_empty(batch, heads, self.length, key_size)
            self.room_values = value_states.new_empty(batch, heads, self.length, value_states.shape[-1])
            self.filled = 0
        end = self.filled + key_states.shape[-2]
        self.room_keys[:, :, self.filled : end] = key_states
        self.room_values[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.room_keys[:, :, :end], self.room_values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            raise RuntimeError("the model does not fill the cache that it is given")
        rows = len(beam_idx)
        for room in (self.room_keys, self.room_values):  # they rise, so rows move towards the front: in place
            room[:rows, :, : self.filled] = room[beam_idx, :, : self.filled]
        self.room_keys, self.room_values = self.room_keys[:rows], self.room_values[:rows]
        self.keys, self.values = self.room_keys[:, :, : self.filled], self.room_values[:, :, : self.filled]
