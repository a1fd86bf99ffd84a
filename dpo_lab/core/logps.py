"""Log-probabilities of responses: the only shift and the only mask, for padded rows and for packed streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


def pad_rows(tokens: Tensor, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """A flat stream as K * B padded rows, all first responses, then all second, ...: (input_ids, labels), [K * B, T] each.

    tokens [N]: prompt and K responses of item 0, then of item 1, ...; lengths [B, 1 + K]: tokens of each.
    labels hold the token itself where it is a response token, IGNORE elsewhere. Pads stand right of all real tokens,
    where a causal model doesn't look, so rows need no attention mask.

    >>> pad_rows(torch.tensor([1, 2, 7, 8, 9]), torch.tensor([[2, 1, 2]]), pad_id=0)   # 1 2 | 7 | 8 9
    input_ids  [[1, 2, 7, 0], [1, 2, 8, 9]]
    labels     [[I, I, 7, I], [I, I, 8, 9]]
    """
    ends = lengths.cumsum(1)
    item = ends[:, -1].cumsum(0) - ends[:, -1]  # [B], where each begins in the stream
    start = (item[:, None] + ends[:, :-1]).T.reshape(-1, 1)  # [K * B, 1], where each response begins
    response = lengths[:, 1:].T.reshape(-1, 1)
    responses = lengths.shape[1] - 1
    prompt, item = lengths[:, 0].repeat(responses)[:, None], item.repeat(responses)[:, None]
    column = torch.arange(int((prompt + response).max()), device=tokens.device)[None, :]
    real, in_response = column < prompt + response, column >= prompt
    source = torch.where(in_response, start + column - prompt, item + column).clamp(max=len(tokens) - 1)
    rows = tokens[source]
    return rows.masked_fill(~real, pad_id), rows.masked_fill(~(real & in_response), IGNORE)


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


@dataclass(frozen=True)
class StreamRows:
    """Where a flat stream's tokens stand in their texts, and which rows predict which response tokens.

    positions [N]: a token's place in prompt + its own response; rows [R]: index of the stream's row that predicts a
    response token (the prompt's last row predicts the first token of every response); targets [R]: that token.
    R counts response tokens in the stream's order.
    """

    positions: Tensor
    rows: Tensor
    targets: Tensor


def stream_rows(tokens: Tensor, lengths: Tensor) -> StreamRows:
    """The rows of a flat stream, see pad_rows for `tokens` and `lengths`.

    >>> stream_rows(torch.tensor([1, 2, 7, 8, 9]), torch.tensor([[2, 1, 2]]))
    positions [0, 1, 2, 2, 3], rows [1, 1, 3], targets [7, 8, 9]
    """
    parts = lengths.shape[1]
    flat = lengths.flatten()
    ends = flat.cumsum(0)
    part = torch.arange(len(flat), device=flat.device).repeat_interleave(flat, output_size=len(tokens))  # [N]
    item, is_response = part // parts, part % parts != 0
    place = torch.arange(len(tokens), device=flat.device)
    offset = place - (ends - flat)[part]
    positions = offset + lengths[:, 0][item] * is_response
    last_of_prompt = ends.view(-1, parts)[:, 0][item] - 1
    predictor = torch.where(offset == 0, last_of_prompt, place - 1)
    return StreamRows(positions, predictor[is_response], tokens[is_response])


def sum_responses(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each response, [B, K], of token log-probabilities [R] in the stream's order."""
    counts = lengths[:, 1:].reshape(-1, 1)
    mask = torch.arange(int(counts.max()), device=counts.device) < counts
    rows = token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)
    return rows.sum(1).view(len(lengths), -1)  # pairwise; index_add would go one by one and round ten times as much
