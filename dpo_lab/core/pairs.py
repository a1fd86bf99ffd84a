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
    from torch import Tensor, device


Message = dict[str, Any]  # as chat templates take it: "role", "content" and what else the template knows
Text = str | list[Message]
Tokens = Sequence[int] | np.ndarray  # token ids


@dataclass(frozen=True)
class Pair:
    """One preference: for `prompt`, an annotator took `chosen` over `rejected`.

    All three are plain text, or all three are lists of chat messages: a prompt of any number, each response of one by the
    assistant. tools: descriptions of the tools that the chat template shows. A whole text, for supervised fine-tuning alone,
    is chosen over an empty string after an empty prompt.

    gold_margin is the true reward of chosen less that of rejected (NaN where no truth is known). Its sign is the true
    preference; it is for evaluation only and never reaches a loss. score_margin is the same by the scores that came with
    the pair, an annotator's ratings say (NaN where none came). The key is a hash of what the pair says, scores aside.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    gold_margin: float = math.nan
    score_margin: float = math.nan
    tools: list[dict[str, Any]] | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        content = [self.prompt, self.chosen, self.rejected, *([self.tools] if self.tools else [])]
        object.__setattr__(self, "key", content_hash(content))

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def decides_split(self) -> Text:
        """What must not stand on both sides of a split: the prompt, and of a whole text the text."""
        return self.prompt if self.rejected else self.chosen


def content_hash(content: Any) -> str:
    """32 hexadecimal digits of what plain values say; the same for equal values, whatever the order of their keys."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids, special tokens included; rejected may be empty in supervised fine-tuning. `flipped` says that label
    noise swapped the two sides.
    """

    key: str
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    gold_margin: float = math.nan
    flipped: bool = False

    @property
    def size(self) -> int:
        """Tokens, the prompt's counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def flip(self) -> EncodedPair:
        """The same pair with the other side chosen; twice is the pair itself."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            gold_margin=-self.gold_margin,
            flipped=not self.flipped,
        )


@dataclass
class PairBatch:
    """One step's pairs, without padding: how rows are laid out is the forward pass's business.

    tokens [N]: prompt, chosen, rejected of pair 0, then of pair 1, ...; lengths [B, 3]: tokens of each of the three;
    flipped [B]: swapped by label noise; gold_margin [B]: see Pair; keys: B pair keys.
    """

    keys: list[str]
    tokens: Tensor
    lengths: Tensor
    flipped: Tensor
    gold_margin: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, tokens: int) -> list[PairBatch]:
        """Micro-batches of neighbouring pairs, see `cut`."""
        sizes = self.lengths.sum(1).tolist()
        parts = chunk_by_size(sizes, tokens)
        streams = self.tokens.split([sum(sizes[part]) for part in parts])
        return [
            PairBatch(self.keys[part], stream, self.lengths[part], self.flipped[part], self.gold_margin[part])
            for part, stream in zip(parts, streams, strict=True)
        ]

    def to(self, device: device | str, non_blocking: bool = False) -> PairBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> PairBatch:
        return PairBatch(
            self.keys, function(self.tokens), function(self.lengths), function(self.flipped), function(self.gold_margin)
        )


def chunk_by_size(sizes: Sequence[int], limit: int) -> list[slice]:
    """Neighbours together as long as their sizes add up to at most `limit`; one that is larger stands alone.

    >>> cut([3, 4, 2, 9, 1], 7)
    [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    """
    parts, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and held + size > limit:
            parts.append(slice(first, i))
            first, held = i, 0
        held += size
    return [*parts, slice(first, len(sizes))] if sizes else []


@dataclass
class PairLogps:
    """Log-probabilities of both responses of B pairs, or log-ratios of two models' (`policy - reference`).

    chosen, rejected [B]: nats, summed over the response's tokens, its end-of-sequence token included;
    chosen_length, rejected_length [B]: how many tokens those are.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @classmethod
    def of(cls, sums: Tensor, lengths: Tensor) -> PairLogps:
        """From sums [B, 2], chosen and rejected, and a batch's lengths [B, 3]."""
        return cls(*sums.unbind(1), *lengths[:, 1:].unbind(1))

    @property
    def margin(self) -> Tensor:
        """chosen less rejected, [B], nats."""
        return self.chosen - self.rejected

    def __sub__(self, other: PairLogps) -> PairLogps:
        return replace(self, chosen=self.chosen - other.chosen, rejected=self.rejected - other.rejected)

    def per_token(self) -> PairLogps:
        """The same, as means over each response's tokens."""
        return replace(self, chosen=self.chosen / self.chosen_length, rejected=self.rejected / self.rejected_length)

    def __getitem__(self, pairs: slice) -> PairLogps:
        return PairLogps(
            self.chosen[pairs], self.rejected[pairs], self.chosen_length[pairs], self.rejected_length[pairs]
        )

    def detach(self) -> PairLogps:
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())
