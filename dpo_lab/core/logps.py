"""Log-probabilities of responses: the only shift and the only mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_lab.core.pairs import PairBatch, PairLogps

IGNORE = -100


def pad_rows(batch: PairBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    """The batch as 2B padded rows, all chosen first, then all rejected: (input_ids, labels), [2B, T] each.

    labels hold the token itself where it is a response token, IGNORE elsewhere. Pads stand right of all real tokens,
    where a causal model doesn't look, so rows need no attention mask.

    >>> batch = PairBatch(["k"], torch.tensor([1, 2, 7, 8, 9]), torch.tensor([[2, 1, 2]]), ...)   # 1 2 | 7 | 8 9
    >>> pad_rows(batch, pad_id=0)
    input_ids  [[1, 2, 7, 0], [1, 2, 8, 9]]
    labels     [[I, I, 7, I], [I, I, 8, 9]]
    """
    prompt, chosen, rejected = batch.lengths.unbind(1)
    start = batch.lengths.sum(1).cumsum(0) - batch.lengths.sum(1)
    start, prompt = start.repeat(2)[:, None], prompt.repeat(2)[:, None]
    response = torch.cat((chosen, rejected))[:, None]
    skipped = torch.cat((torch.zeros_like(chosen), chosen))[:, None]  # a rejected response stands behind the chosen one
    column = torch.arange(int((prompt + response).max()), device=batch.tokens.device)[None, :]
    real, in_response = column < prompt + response, column >= prompt
    source = (start + column + skipped * in_response).clamp(max=len(batch.tokens) - 1)
    tokens = batch.tokens[source]
    return tokens.masked_fill(~real, pad_id), tokens.masked_fill(~(real & in_response), IGNORE)


def response_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Single responses as padded rows: (input_ids, labels), [S, T] each, laid out and labelled as pad_rows does it."""
    both = list(zip(prompts, responses, strict=True))
    width = max(len(prompt) + len(response) for prompt, response in both)
    input_ids = [[*p, *r] + [pad_id] * (width - len(p) - len(r)) for p, r in both]
    labels = [[IGNORE] * len(p) + [*r] + [IGNORE] * (width - len(p) - len(r)) for p, r in both]
    return torch.tensor(input_ids), torch.tensor(labels)


def sequence_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of log-probabilities of the labelled tokens and their number, [S] each, from logits [S, T, V].

    logits at t predict the label at t + 1; labels of IGNORE are not scored; a row without labels has sum 0 and count 0.
    Sums are float32, or float64 for float64 logits.
    """
    labels, logits = labels[:, 1:], logits[:, :-1]
    mask = labels != IGNORE
    rows = logits[mask]  # [R, V]: only rows that predict a response token
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scored = rows.log_softmax(-1).gather(1, labels[mask][:, None])[:, 0]
    token_logps = scored.new_zeros(mask.shape).masked_scatter(mask, scored)
    return token_logps.sum(1), mask.sum(1)


def pair_up(sums: Tensor, lengths: Tensor) -> PairLogps:
    """PairLogps from 2B rows, all chosen first, then all rejected."""
    chosen, rejected = sums.chunk(2)
    chosen_length, rejected_length = lengths.chunk(2)
    return PairLogps(chosen, rejected, chosen_length, rejected_length)
