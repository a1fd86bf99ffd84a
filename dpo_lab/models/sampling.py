"""Samples from a model: batched, with a KV cache, each prompt with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dpo_lab.core.pairs import Tokens
from dpo_lab.core.ranks import across, alone, rank_and_world_size
from dpo_lab.data.tokenize import Encoder
from dpo_lab.results.progress import track


def respond(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    seed: int,
    what: str,
    batch_size: int = 512,
    by_ranks: bool = False,
) -> list[Sample]:
    """A sampled response to each encoded prompt, with a bar called `what`; see `sample`."""
    with track(what, len(prompts), shown=not by_ranks or rank_and_world_size()[0] == 0) as advance:
        return sample(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=encoder.end_ids,
            pad_id=encoder.pad_id,
            seed=seed,
            batch_size=batch_size,
            by_ranks=by_ranks,
            progress=advance,
        )


@dataclass(frozen=True)
class Sample:
    """A sampled response: its token ids (the end token included, if it came) and whether it came."""

    tokens: tuple[int, ...]
    stopped: bool


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int = 512,
    by_ranks: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """One response for each prompt (token ids), drawn from the model's full distribution at temperature 1.

    Each prompt has its own uniform numbers, a function of (seed, its place in `prompts`): how prompts are batched does
    not change what is drawn, but for a rounding at the edge of a token's share. by_ranks: all ranks call this, share the
    batches out and get all samples; a batch holds the same prompts whatever their number, so the draws are the same to the
    last bit. progress is called with the number of responses finished since the last call, the other ranks taken to be as
    far as this one.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    work = [len(chosen) * (len(prompts[chosen[-1]]) + max_new_tokens) for chosen in batches]
    abreast, left = rank_and_world_size()[1] if by_ranks else 1, len(prompts)

    def finish(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        progress(count)

    def respond_to(chosen: list[int]) -> list[Sample]:
        rows = _sample_batch(model, [prompts[i] for i in chosen], uniforms[chosen], end_ids, pad_id)
        finish(abreast * len(chosen))
        return rows

    was_training = model.training
    model.eval()
    try:
        sampled = (across if by_ranks else alone)(batches, work, respond_to)
    finally:
        model.train(was_training)
    if left:
        finish(left)
    in_place = {
        i: row for chosen, rows in zip(batches, sampled, strict=True) for i, row in zip(chosen, rows, strict=True)
    }
    return [in_place[i] for i in range(len(prompts))]


def _sample_batch(
    model: PreTrainedModel, prompts: list[Tokens], uniforms: Tensor, end_ids: Sequence[int], pad_id: int
) -> list[Sample]:
    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    input_ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)
    real = torch.arange(width, device=device)[None, :] >= padding[:, None]
    mask = real.long() if bool(padding.any()) else None  # without padding the model's causal attention is enough
    position = (torch.arange(width, device=device)[None, :] - padding[:, None]).clamp(min=0)
    uniforms, ends = uniforms.to(device), torch.tensor(end_ids, device=device)
    cache = _growing_cache(model, width + uniforms.shape[1])
    tokens = torch.full(uniforms.shape, pad_id, device=device)
    alive = torch.arange(len(prompts), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(uniforms.shape[1]):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        drawn = draw(logits, uniforms[alive, step])
        tokens[alive, step] = drawn
        finished = finished | torch.isin(drawn, ends)
        if bool(finished.all()):
            break
        if int(finished.sum()) > len(alive) // 8:  # finished rows leave the batch, several at a time
            going = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(going)
            alive, drawn, position, finished = alive[going], drawn[going], position[going], finished[going]
            mask = mask[going] if mask is not None else None
        input_ids, position = drawn[:, None], position[:, -1:] + 1
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1) if mask is not None else None
    return [_cut(row, end_ids) for row in tokens.tolist()]


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token for each row of logits [B, V] by inverting its cumulative distribution at uniforms [B]; [B]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _cut(row: list[int], end_ids: Sequence[int]) -> Sample:
    end = next((place for place, token in enumerate(row) if token in end_ids), None)
    return Sample(tuple(row), stopped=False) if end is None else Sample(tuple(row[: end + 1]), stopped=True)


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

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = len(indices)
        for room in (self.room_keys, self.room_values):  # indices rise, so rows move towards the front: in place
            room[:rows, :, : self.filled] = room[indices, :, : self.filled]
        self.room_keys, self.room_values = self.room_keys[:rows], self.room_values[:rows]
        self.keys, self.values = self.room_keys[:, :, : self.filled], self.room_values[:, :, : self.filled]
