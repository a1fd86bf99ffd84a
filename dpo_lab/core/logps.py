"""Log-probabilities of responses: the only shift and the only mask, for padded rows and for packed streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpo_lab.core.pairs import to_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORE = -100


def pad_rows(
    tokens: Int[Tensor, " tokens"], lengths: Int[np.ndarray, "items parts"], pad_id: int
) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows columns"]]:
    """Unpack a stream to padded rows: (input_ids, labels); all first responses, then all second, ...

    tokens: prompt and K responses of item 0, then of item 1, ...; lengths: the length of each part in tokens, 1 + K an
    item. There are K rows an item.
    labels hold the token at response tokens, IGNORE elsewhere. Padding is on the right, where a causal model does not
    attend, so rows need no attention mask.

    >>> pad_rows(torch.tensor([1, 2, 7, 8, 9]), np.array([[2, 1, 2]]), pad_id=0)   # 1 2 | 7 | 8 9
    input_ids  [[1, 2, 7, 0], [1, 2, 8, 9]]
    labels     [[I, I, 7, I], [I, I, 8, 9]]
    """
    begins = lengths.cumsum().reshape(lengths.shape) - lengths  # of each part in the stream
    start, response = (each[:, 1:].T.reshape(-1, 1) for each in (begins, lengths))  # [K * B, 1], of each response
    item, prompt = (np.tile(each[:, 0], lengths.shape[1] - 1)[:, None] for each in (begins, lengths))
    column = np.arange((prompt + response).max())[None, :]
    real, in_response = column < prompt + response, column >= prompt
    source = np.where(in_response, start + column - prompt, item + column)
    found = to_device(torch.from_numpy(np.stack((np.where(real, source, -1), in_response))), tokens.device)
    rows, is_padding = tokens[found[0].clamp(min=0)], found[0] < 0
    return rows.masked_fill(is_padding, pad_id), rows.masked_fill(is_padding | (found[1] == 0), IGNORE)


def predicting_rows(lengths: Int[np.ndarray, "items parts"]) -> Int[np.ndarray, " response_tokens"]:
    """Return which of pad_rows' rows, flattened, predict the response tokens, in the order of the stream.

    >>> predicting_rows(np.array([[2, 1, 2]]))    # of rows of 4 columns
    [1, 5, 6]
    """
    items, responses = len(lengths), lengths.shape[1] - 1
    counts = lengths[:, 1:].ravel()
    rows = np.arange(responses) * items + np.arange(items)[:, None]  # of each response
    columns = (lengths[:, :1] + lengths[:, 1:]).max()
    begins = (rows * columns + lengths[:, :1] - 1).ravel() - (counts.cumsum() - counts)
    return np.arange(counts.sum()) + np.repeat(begins, counts)


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
    """What a packed stream takes through a model, and which of its rows predict which response tokens.

    tokens, lengths: the stream that is taken, with or without the last token of each response; positions: position of
    each of its tokens in prompt + response; rows: index of its row that predicts each response token (the last row of a
    prompt predicts the first token of all its responses); targets: that token. Response tokens are in the order of the
    stream.
    """

    tokens: Int[Tensor, " taken"]
    lengths: Int[np.ndarray, "items parts"]
    positions: Int[Tensor, " taken"]
    rows: Int[Tensor, " response_tokens"]
    targets: Int[Tensor, " response_tokens"]


def stream_rows(
    tokens: Int[Tensor, " tokens"], lengths: Int[np.ndarray, "items parts"], keeps_last: bool = True
) -> StreamRows:
    """Return positions, rows and targets of a packed stream; for `tokens` and `lengths` see pad_rows.

    keeps_last: whether the last token of each response, from which nothing is predicted, is taken too.

    >>> stream_rows(torch.tensor([1, 2, 7, 8, 9]), np.array([[2, 1, 2]]))
    positions [0, 1, 2, 2, 3], rows [1, 1, 3], targets [7, 8, 9]
    >>> stream_rows(torch.tensor([1, 2, 7, 8, 9]), np.array([[2, 1, 2]]), keeps_last=False)
    tokens [1, 2, 8], lengths [[2, 0, 1]], positions [0, 1, 2], rows [1, 1, 2], targets [7, 8, 9]
    """
    flat = lengths.ravel()
    ends = flat.cumsum()
    place = np.arange(len(tokens))
    offset = place - np.repeat(ends - flat, flat)  # of each token in its part
    of_response = np.arange(len(flat)) % lengths.shape[1] != 0
    is_response = np.repeat(of_response, flat)
    prompts, ends_of_prompts = (
        np.repeat(each[:, 0], lengths.sum(1)) for each in (lengths, ends.reshape(lengths.shape))
    )
    predictor = np.where(offset == 0, ends_of_prompts - 1, place - 1)[is_response]
    positions, responses, taken = offset + prompts * is_response, place[is_response], place
    if not keeps_last:
        dropped = of_response & (flat > 0)
        taken = np.delete(place, ends[dropped] - 1)
        lengths, positions = lengths - dropped.reshape(lengths.shape), positions[taken]
        predictor = taken.searchsorted(predictor)
    found = (taken, positions, predictor, responses)
    together = to_device(torch.from_numpy(np.concatenate(found)), tokens.device)
    places, positions, rows, responses = together.split([len(each) for each in found])
    return StreamRows(tokens[places], lengths, positions, rows, tokens[responses])


def sum_responses(
    token_logps: Float[Tensor, " response_tokens"],
    lengths: Int[np.ndarray, "items parts"],
    weights: Float[Tensor, " response_tokens"] | None = None,
) -> Float[Tensor, "items parts-1"]:
    """Sum token log-probabilities, in the order of the stream, over each response; for `lengths` see pad_rows.

    weights: what each is multiplied with first, None for 1.
    """
    if weights is not None:
        token_logps = token_logps * weights
    counts = lengths[:, 1:].ravel()
    width = int(counts.max())
    begins = np.arange(len(counts)) * width - (counts.cumsum() - counts)
    places = to_device(torch.from_numpy(np.arange(counts.sum()) + np.repeat(begins, counts)), token_logps.device)
    rows = token_logps.new_zeros(len(counts) * width).scatter(0, places, token_logps).view(-1, width)
    return rows.sum(1).view(len(lengths), -1)  # pairwise summation; index_add's rounding error is ten times as large
