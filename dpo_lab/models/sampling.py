"""Sample responses from a model: batched, with random numbers of its own for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.pairs import Tokens
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import map_across_ranks, rank_and_world_size
from dpo_lab.models.decoding import Rows, rows_of
from dpo_lab.models.sharding import device_of, is_sharded, own_passes
from dpo_lab.terminal.progress import track

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def generate_responses(
    model: PreTrainedModel,
    encoder: PairTokenizer,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    seed: int,
    what: str,
    batch_size: int = 512,
) -> list[Sample]:
    """Sample a response to each encoded prompt, with a progress bar titled `what`; see `sample`."""
    with track(what, len(prompts), shown=rank_and_world_size()[0] == 0) as advance:
        return sample(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=encoder.end_ids,
            pad_id=encoder.pad_id,
            seed=seed,
            batch_size=batch_size,
            progress=advance,
        )


@dataclass(frozen=True)
class Sample:
    """A sampled response. tokens: its token ids, with the end token if it was sampled; stopped: whether it was; logps: the
    log-probability, in nats, that each token was drawn with.
    """

    tokens: tuple[int, ...]
    stopped: bool
    logps: tuple[float, ...] = field(default=(), compare=False)


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int = 512,
    shares_prompts: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Sample one response per prompt (token ids) from the model's full distribution at temperature 1.

    Each prompt has its own uniform random numbers, a function of the seed and of its index in `prompts`. So batching
    does not change the samples, except where rounding moves the boundary between two tokens. Batches are divided over
    ranks, which all have to call it and get all samples; a batch holds the same prompts for any number of ranks, so
    samples are equal bit for bit. shares_prompts: whether equal prompts of a batch run through the model once. progress is
    called with the number of responses finished since its last call, assuming that the other ranks are as fast as this one.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    work = [len(indices) * (len(prompts[indices[-1]]) + max_new_tokens) for indices in batches]
    ranks, left = rank_and_world_size()[1], len(prompts)

    def finish(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        progress(count)

    def sample_batch(indices: list[int]) -> list[Sample]:
        rows = rows_of(model, [prompts[i] for i in indices], pad_id, max_new_tokens, shares_prompts)
        samples = _sample_batch(rows, uniforms[indices].to(device_of(model)), end_ids, pad_id)
        finish(ranks * len(indices))
        return samples

    # FSDP would gather weights into inference tensors, which training can't use
    with evaluating(model), torch.inference_mode(not is_sharded(model)), torch.no_grad():
        sampled = map_across_ranks(batches, work, sample_batch, own_passes(model))
    if left:
        finish(left)
    by_index = {
        i: row for batch, rows in zip(batches, sampled, strict=True) for i, row in zip(batch, rows, strict=True)
    }
    return [by_index[i] for i in range(len(prompts))]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode; at the end each of its modules has its own mode again."""
    modes = {module: module.training for module in model.modules()}  # checkpointed layers have one of their own
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _sample_batch(rows: Rows, uniforms: Tensor, end_ids: Sequence[int], pad_id: int) -> list[Sample]:
    device, count = uniforms.device, len(uniforms)
    ends = torch.tensor(end_ids, device=device)
    tokens = torch.full(uniforms.shape, pad_id, device=device)
    logps = torch.zeros(uniforms.shape, device=device)
    active = torch.arange(count, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(uniforms.shape[1]):
        next_tokens, drawn_with = draw(rows.logits(), uniforms[active, step])
        tokens[active, step], logps[active, step] = next_tokens, drawn_with
        finished = finished | torch.isin(next_tokens, ends)
        if bool(finished.all()):
            break
        if int(finished.sum()) > len(active) // 16:  # remove finished rows from the batch, several at a time
            kept = _fill_gaps(finished)
            rows.keep(kept)
            active, next_tokens, finished = active[kept], next_tokens[kept], finished[kept]
        rows.append(next_tokens)
    return [until_end(row, end_ids, drawn) for row, drawn in zip(tokens.tolist(), logps.tolist(), strict=True)]


def _fill_gaps(finished: Tensor) -> Tensor:
    """Return the unfinished rows, of which the last ones take the places of finished rows, so that few rows move.

    >>> _fill_gaps([False, True, False, True, False])
    [0, 4, 2]
    """
    unfinished = (~finished).nonzero()[:, 0]
    kept = torch.arange(len(unfinished), device=finished.device)
    kept[finished[: len(kept)]] = unfinished[unfinished >= len(kept)]
    return kept


def draw(
    logits: Float[Tensor, "rows vocabulary"], uniforms: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Sample a token from each row of logits by inverting its cumulative distribution at `uniforms`.

    Returns the tokens and their log-probabilities in nats.
    """
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log().float()


def until_end(row: Sequence[int], end_ids: Sequence[int], logps: Sequence[float] = ()) -> Sample:
    """Return the tokens of a row up to its first end token as a sample."""
    end = next((i for i, token in enumerate(row) if token in end_ids), None)
    length = len(row) if end is None else end + 1
    return Sample(tuple(row[:length]), end is not None, tuple(logps[:length]))
