"""Sample responses from a model: batched, with random numbers of its own for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.pairs import Tokens
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import map_across_ranks, map_local, rank_and_world_size
from dpo_lab.models.decoding import rows_of
from dpo_lab.terminal.progress import track


def generate_responses(
    model: PreTrainedModel,
    encoder: PairTokenizer,
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
    not change what is drawn, but for a rounding at the edge of a token's share. by_ranks: all ranks call this, share
    the batches out and get all samples; a batch holds the same prompts whatever their number, so the draws are the same
    to the last bit. progress is called with the number of responses finished since the last call, the other ranks taken
    to be as far as this one.
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
        sampled = (map_across_ranks if by_ranks else map_local)(batches, work, respond_to)
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
    rows = rows_of(model, prompts, pad_id, uniforms.shape[1])
    uniforms, ends = uniforms.to(device), torch.tensor(end_ids, device=device)
    tokens = torch.full(uniforms.shape, pad_id, device=device)
    alive = torch.arange(len(prompts), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(uniforms.shape[1]):
        drawn = draw(rows.logits(), uniforms[alive, step])
        tokens[alive, step] = drawn
        finished = finished | torch.isin(drawn, ends)
        if bool(finished.all()):
            break
        if int(finished.sum()) > len(alive) // 8:  # finished rows leave the batch, several at a time
            going = (~finished).nonzero()[:, 0]
            rows.keep(going)
            alive, drawn, finished = alive[going], drawn[going], finished[going]
        rows.append(drawn)
    return [_until_end(row, end_ids) for row in tokens.tolist()]


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token for each row of logits [B, V] by inverting its cumulative distribution at uniforms [B]; [B]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _until_end(row: list[int], end_ids: Sequence[int]) -> Sample:
    end = next((place for place, token in enumerate(row) if token in end_ids), None)
    return Sample(tuple(row), stopped=False) if end is None else Sample(tuple(row[: end + 1]), stopped=True)
