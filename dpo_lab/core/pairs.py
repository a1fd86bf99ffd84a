"""The data types of a step: Pair (text), EncodedPair (token ids), PairBatch (the pairs of one step), PairLogps (log-
probabilities).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num
    from torch import Tensor, device


Message = dict[
    str, Any
]  # a message as a chat template takes it: "role", "content" and other keys that the template reads
Text = str | list[Message]
Tokens = Sequence[int] | np.ndarray  # token ids


@dataclass(frozen=True)
class Pair:
    """A preference pair: for `prompt`, an annotator preferred `chosen` to `rejected`.

    All three are plain text, or all three are lists of chat messages: any number for the prompt; a response begins and
    ends with one of the assistant, and what others say between is not scored. tools: tool descriptions that the chat
    template renders. is_single: whether it is one response, and the other side, which is empty, does not exist: one that
    was labelled on its own is `chosen` if it is desirable and `rejected` if not; a text without a prompt, for supervised
    fine-tuning only, is `chosen` with an empty prompt; a prompt alone, for methods that sample, has neither. A sampled
    response may be empty and exist.

    gold_margin is the true reward of chosen minus that of rejected (NaN if unknown). Its sign is the true preference;
    it is used in evaluation only, and in losses that ask for scores (ODPO). score_margin is the same difference in the
    scores that came with the pair, such as an annotator's ratings (NaN if there are none). key is a hash of the pair's
    content without scores.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    gold_margin: float = math.nan
    score_margin: float = math.nan
    tools: list[dict[str, Any]] | None = None
    is_single: bool = False
    key: str = field(init=False)

    def __post_init__(self) -> None:
        content = [self.prompt, self.chosen, self.rejected, *([self.tools] if self.tools else [])]
        object.__setattr__(self, "key", content_hash(content))

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def responses(self) -> dict[str, Text]:
        """The responses that the pair has, `chosen` and `rejected` or one of them."""
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        return {name: side for name, side in sides.items() if side or not self.is_single}

    @property
    def decides_split(self) -> Text:
        """The text that decides the split, which is never in both: the prompt, or a single text if it has no prompt.

        Of a chat it is the prompt up to the user's last message: first messages of the answer belong to the prompt only where
        both sides share them.
        """
        if isinstance(self.prompt, str):
            return self.prompt if self.prompt or len(self.responses) == 2 else self.chosen or self.rejected
        return self.prompt[: messages_before_answer(self.prompt)] or self.prompt


def messages_before_answer(dialogue: list[Message]) -> int:
    """Return the number of messages up to the last one of the user, 0 if there is none; an answer begins after them."""
    return max((at for at, message in enumerate(dialogue, 1) if message["role"] == "user"), default=0)


def content_hash(content: Any) -> str:
    """Return a hash of JSON values as 32 hexadecimal digits, independent of the order of keys."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids, special tokens included; one side is empty where a response was labelled on its own.

    flipped: whether label noise swapped chosen and rejected. scored: which tokens of chosen and of rejected are scored,
    None for all; tail_weight: see `token_weights`. score_gap: difference of scores, see PairTable.score_gap; unrelated:
    the prompt with a response of another pair, see PairTable.with_unrelated. Both are None where the loss does not ask
    for them.
    """

    key: str
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    gold_margin: float = math.nan
    flipped: bool = False
    scored: tuple[np.ndarray, np.ndarray] | None = None
    tail_weight: float = 1.0
    score_gap: float | None = None
    unrelated: EncodedPair | None = None

    @property
    def size(self) -> int:
        """Number of tokens, prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def scored_lengths(self) -> tuple[int, int]:
        """Number of scored tokens of chosen and of rejected."""
        if self.scored is None:
            return len(self.chosen), len(self.rejected)
        return int(self.scored[0].sum()), int(self.scored[1].sum())

    @property
    def token_weights(self) -> np.ndarray:
        """The weight of each token of chosen, then of rejected, in their log-probabilities: 0 for a token that is not
        scored, tail_weight for a scored one beyond the number of scored tokens of the other response, else 1.
        """
        shared = min(self.scored_lengths) or max(self.scored_lengths)  # an empty response is shorter than none
        scored = self.scored or (np.ones(len(self.chosen), bool), np.ones(len(self.rejected), bool))
        return np.concatenate(
            [np.where(each.cumsum() > shared, self.tail_weight, 1) * each for each in scored], dtype=np.float32
        )

    def flip(self) -> EncodedPair:
        """Return the pair with chosen and rejected swapped; flipping twice returns the original pair."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            gold_margin=-self.gold_margin,
            flipped=not self.flipped,
            scored=self.scored and self.scored[::-1],
            score_gap=None if self.score_gap is None else -self.score_gap,
        )


@dataclass
class PairBatch:
    """The pairs of a step, without padding; the forward pass pads them if it needs to.

    tokens: prompt, chosen, rejected of pair 0, then of pair 1, ...; lengths: number of tokens of each, in an array,
    since shapes depend on it and a GPU's tensor would have to be waited for; scored_lengths: number of scored tokens of
    chosen and rejected; response_lengths: the same on the device of the batch; weights: of the response tokens, in the
    order of the stream, None where all are 1; flipped: whether label noise swapped chosen and rejected; gold_margin: see
    Pair; keys: one a pair; score_gap, unrelated: those of EncodedPair, of all pairs or None.
    """

    keys: list[str]
    tokens: Int[Tensor, " tokens"]
    lengths: Int[np.ndarray, "pairs 3"]
    scored_lengths: Int[np.ndarray, "pairs 2"]
    response_lengths: Int[Tensor, "pairs 2"]
    flipped: Bool[Tensor, " pairs"]
    gold_margin: Float[Tensor, " pairs"]
    weights: Float[Tensor, " response_tokens"] | None = None
    score_gap: Float[Tensor, " pairs"] | None = None
    unrelated: PairBatch | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, tokens: int) -> list[PairBatch]:
        """Split into micro-batches of consecutive pairs, see `chunk_by_size`."""
        return self._parts(chunk_by_size(self.lengths.sum(1).tolist(), tokens))

    def _parts(self, parts: Sequence[slice]) -> list[PairBatch]:
        sizes: list[int] = self.lengths.sum(1).tolist()
        streams = self.tokens.split([sum(sizes[part]) for part in parts])
        counts = [int(self.lengths[part, 1:].sum()) for part in parts]
        weights = [None] * len(parts) if self.weights is None else self.weights.split(counts)
        unrelated = [None] * len(parts) if self.unrelated is None else self.unrelated._parts(parts)
        return [
            PairBatch(
                self.keys[part],
                stream,
                self.lengths[part],
                self.scored_lengths[part],
                self.response_lengths[part],
                self.flipped[part],
                self.gold_margin[part],
                weights_of_part,
                None if self.score_gap is None else self.score_gap[part],
                unrelated_of_part,
            )
            for part, stream, weights_of_part, unrelated_of_part in zip(parts, streams, weights, unrelated, strict=True)
        ]

    def to(self, device: device | str) -> PairBatch:
        """Copy the tensors of the batch to a device, see `to_device`."""
        names = ("tokens", "response_lengths", "flipped", "gold_margin", "weights", "score_gap")
        there = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        unrelated = None if self.unrelated is None else self.unrelated.to(device)
        return replace(self, **{name: to_device(each, device) for name, each in there.items()}, unrelated=unrelated)


def to_device(tensor: Tensor, device: device | str) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU through pinned memory, so that the host does not wait."""
    import torch

    if not (tensor.is_cpu and str(device).startswith("cuda")):
        return tensor.to(device)
    pinned = tensor.pin_memory() if torch.cuda.is_available() else tensor
    return pinned.to(device, non_blocking=True)


def chunk_by_size(sizes: Sequence[int], limit: int) -> list[slice]:
    """Split a sequence into chunks whose sizes sum to at most `limit`; an item above the limit is a chunk of its own.

    >>> chunk_by_size([3, 4, 2, 9, 1], 7)
    [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    """
    chunks, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            chunks.append(slice(first, i))
            first, total = i, 0
        total += size
    return [*chunks, slice(first, len(sizes))] if sizes else []


@dataclass
class PairLogps:
    """Log-probabilities of both responses of pairs, or log-ratios of two models (`policy - reference`).

    chosen, rejected: in nats, summed over the scored tokens of the response, end-of-sequence token included, each times
    its weight if it has one; chosen_length, rejected_length: the number of these tokens, 0 of a response that a pair does
    not have, whose sum is 0. weight: of the pair's loss, None for 1. unrelated: of a response of another pair to the prompt,
    and score_gap, which comes with the reference: see EncodedPair; None where they were not asked for.
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    chosen_length: Num[Tensor, " pairs"]
    rejected_length: Num[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"] | None = None
    unrelated: Float[Tensor, " pairs"] | None = None
    score_gap: Float[Tensor, " pairs"] | None = None

    @classmethod
    def of(cls, sums: Float[Tensor, "pairs sums"], response_lengths: Int[Tensor, "pairs 2"]) -> PairLogps:
        """Build from the sums and the lengths of chosen and rejected.

        sums: those of log-probabilities [B, 2], and maybe beside them those of relative ones [B, 2], see fused_loss. From
        these follows the weight of the pair, w(chosen) w(rejected): w(y) is the exponential of their mean over tokens.
        """
        pair = cls(*sums[:, :2].unbind(1), *response_lengths.unbind(1))
        if sums.shape[1] == 2:
            return pair
        return replace(pair, weight=(sums[:, 2:] / response_lengths.clamp(min=1)).sum(1).exp().detach())

    def weigh(self, losses: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Multiply the loss of each pair with its weight, if it has one."""
        return losses if self.weight is None else losses * self.weight

    @classmethod
    def concat(cls, parts: Sequence[PairLogps]) -> PairLogps:
        """Concatenate the pairs of several batches."""
        import torch

        columns = [[getattr(part, each.name) for part in parts] for each in fields(cls)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return cls(*joined)

    def to(self, device: device | str) -> PairLogps:
        """Copy to a device."""
        return self._map(lambda column: column.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        columns = [getattr(self, each.name) for each in fields(self)]
        changed: list[Any] = [None if column is None else change(column) for column in columns]
        return PairLogps(*changed)

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """chosen - rejected, in nats."""
        return self.chosen - self.rejected

    def __sub__(self, other: PairLogps) -> PairLogps:
        return replace(self, chosen=self.chosen - other.chosen, rejected=self.rejected - other.rejected)

    def per_token(self) -> PairLogps:
        """Divide by the number of tokens of each response."""
        return replace(self, chosen=self.chosen / self.chosen_length, rejected=self.rejected / self.rejected_length)

    def __getitem__(self, pairs: slice | Tensor) -> PairLogps:
        return self._map(lambda column: column[pairs])

    def detach(self) -> PairLogps:
        return self._map(lambda column: column.detach())
