"""The data types of a step: Pair (text), EncodedPair (token ids), PairBatch (the pairs of one step), PairLogps (log-
probabilities).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    fine-tuning only, is `chosen` with an empty prompt. A sampled response may be empty and exist.

    gold_margin is the true reward of chosen minus that of rejected (NaN if unknown). Its sign is the true preference;
    it is used in evaluation only and never enters a loss. score_margin is the same difference in the scores that came
    with the pair, such as an annotator's ratings (NaN if there are none). key is a hash of the pair's content without
    scores.
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
        """The text that decides the split, which is never in both: the prompt, or a single text if it has no prompt."""
        return self.prompt if self.prompt or len(self.responses) == 2 else self.chosen or self.rejected


def content_hash(content: Any) -> str:
    """Return a hash of JSON values as 32 hexadecimal digits, independent of the order of keys."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids, special tokens included; one side is empty where a response was labelled on its own.

    flipped: whether label noise swapped chosen and rejected. scored: which tokens of chosen and of rejected are scored,
    None for all; tail_weight: see `token_weights`.
    """

    key: str
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    gold_margin: float = math.nan
    flipped: bool = False
    scored: tuple[np.ndarray, np.ndarray] | None = None
    tail_weight: float = 1.0

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
        )


@dataclass
class PairBatch:
    """The pairs of a step, without padding; the forward pass pads them if it needs to.

    tokens: prompt, chosen, rejected of pair 0, then of pair 1, ...; lengths: number of tokens of each, in an array,
    since shapes depend on it and a GPU's tensor would have to be waited for; scored_lengths: number of scored tokens of
    chosen and rejected; response_lengths: the same on the device of the batch; weights: of the response tokens, in the
    order of the stream, None where all are 1; flipped: whether label noise swapped chosen and rejected; gold_margin: see
    Pair; keys: one a pair.
    """

    keys: list[str]
    tokens: Int[Tensor, " tokens"]
    lengths: Int[np.ndarray, "pairs 3"]
    scored_lengths: Int[np.ndarray, "pairs 2"]
    response_lengths: Int[Tensor, "pairs 2"]
    flipped: Bool[Tensor, " pairs"]
    gold_margin: Float[Tensor, " pairs"]
    weights: Float[Tensor, " response_tokens"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, tokens: int) -> list[PairBatch]:
        """Split into micro-batches of consecutive pairs, see `chunk_by_size`."""
        sizes: list[int] = self.lengths.sum(1).tolist()
        parts = chunk_by_size(sizes, tokens)
        streams = self.tokens.split([sum(sizes[part]) for part in parts])
        counts = [int(self.lengths[part, 1:].sum()) for part in parts]
        weights = [None] * len(parts) if self.weights is None else self.weights.split(counts)
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
            )
            for part, stream, weights_of_part in zip(parts, streams, weights, strict=True)
        ]

    def to(self, device: device | str) -> PairBatch:
        """Copy the tensors of the batch to a device, see `to_device`."""
        names = [
            "tokens",
            "response_lengths",
            "flipped",
            "gold_margin",
            *(["weights"] if self.weights is not None else []),
        ]
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


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
    not have, whose sum is 0. weight: of the pair's loss, None for 1.
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    chosen_length: Num[Tensor, " pairs"]
    rejected_length: Num[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"] | None = None

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

        return cls(*(torch.cat(column) for column in zip(*(part._columns for part in parts), strict=True)))

    def to(self, device: device | str) -> PairLogps:
        """Copy to a device, without weights of pairs."""
        return PairLogps(*(column.to(device) for column in self._columns))

    @property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chosen, self.rejected, self.chosen_length, self.rejected_length

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
        weight = None if self.weight is None else self.weight[pairs]
        return PairLogps(*(column[pairs] for column in self._columns), weight=weight)

    def detach(self) -> PairLogps:
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())
