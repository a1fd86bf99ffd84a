"""Log-probabilities of responses: the only shift and the only mask, for padded rows and for packed streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORE = -100


def pad_rows(
    tokens: Int[Tensor, " tokens"], lengths: Int[Tensor, "items parts"], pad_id: int
) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows columns"]]:
    """Unpack a stream to padded rows: (input_ids, labels); all first responses, then all second, ...

    tokens: prompt and K responses of item 0, then of item 1, ...; lengths: the length of each part in tokens, 1 + K an
    item. There are K rows an item.
    labels hold the token at response tokens, IGNORE elsewhere. Padding is on the right, where a causal model does not
    attend, so rows need no attention mask.

    >>> pad_rows(torch.tensor([1, 2, 7, 8, 9]), torch.tensor([[2, 1, 2]]), pad_id=0)   # 1 2 | 7 | 8 9
    input_ids  [[1, 2, 7, 0], [1, 2, 8, 9]]
    labels     [[I, I, 7, I], [I, I, 8, 9]]
    """
    ends = lengths.cumsum(1)
    item = ends[:, -1].cumsum(0) - ends[:, -1]  # [B], start of each item in the stream
    start = (item[:, None] + ends[:, :-1]).T.reshape(-1, 1)  # [K * B, 1], start of each response
    response = lengths[:, 1:].T.reshape(-1, 1)
    responses = lengths.shape[1] - 1
    prompt, item = lengths[:, 0].repeat(responses)[:, None], item.repeat(responses)[:, None]
    column = torch.arange(int((prompt + response).max()), device=tokens.device)[None, :]
    real, in_response = column < prompt + response, column >= prompt
    source = torch.where(in_response, start + column - prompt, item + column).clamp(max=len(tokens) - 1)
    rows = tokens[source]
    return rows.masked_fill(~real, pad_id), rows.masked_fill(~(real & in_response), IGNORE)


def sequence_logps(
    logits: Float[Tensor, "rows columns vocabulary"], labels: Int[Tensor, "rows columns"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Return the summed log-probabilities of the labelled tokens of each row, in nats, and the number of these.

    Logits at t predict the label at t + 1; labels of IGNORE are not scored; a row without labels has sum 0 and count 0.
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
    """Position ids of a packed stream, and which of its rows predict which response tokens.

    positions: position of each token in its prompt + response; rows: index of the row of the stream that predicts each
    response token (the last row of a prompt predicts the first token of all its responses); targets: that token.
    Response tokens are in the order of the stream.
    """

    positions: Int[Tensor, " tokens"]
    rows: Int[Tensor, " response_tokens"]
    targets: Int[Tensor, " response_tokens"]


def stream_rows(tokens: Int[Tensor, " tokens"], lengths: Int[Tensor, "items parts"]) -> StreamRows:
    """Return positions, rows and targets of a packed stream; for `tokens` and `lengths` see pad_rows.

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


def sum_responses(
    token_logps: Float[Tensor, " response_tokens"], lengths: Int[Tensor, "items parts"]
) -> Float[Tensor, "items parts-1"]:
    """Sum token log-probabilities, in the order of the stream, over each response."""
    counts = lengths[:, 1:].reshape(-1, 1)
    mask = torch.arange(int(counts.max()), device=counts.device) < counts
    rows = token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)
    return rows.sum(1).view(len(lengths), -1)  # pairwise summation; index_add's rounding error is ten times as large
