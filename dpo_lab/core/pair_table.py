"""A table of encoded pairs as columns, in memory or memory-mapped, so that a million pairs cost their columns and no
more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from dpo_lab.core.pairs import EncodedPair

COLUMNS = ("keys", "starts", "lengths", "gold_margin", "score_margin", "flipped")  # a row of each for each pair
MAPPED = {"tokens": np.int32, "scored": np.bool_}  # columns that may be memory-mapped files


@dataclass(frozen=True)
class PairTable(Sequence[EncodedPair]):
    """A sequence of N pairs stored as columns; indexing returns an EncodedPair.

    keys [N] (ASCII bytes); tokens [T] int32: token ids of all pairs, possibly of others too; starts [N]: offset of each
    pair in `tokens`; lengths [N, 3]: number of tokens of prompt, chosen and rejected as annotated, stored in that
    order; gold_margin, score_margin [N]: see Pair, as annotated; flipped [N]: whether label noise swapped chosen and
    rejected. scored [T] bool: which of `tokens` are scored if they belong to a response, None for all; tail_weight: of
    every pair, see EncodedPair; with_scores: whether pairs have their score_gap; unrelated: a row for each pair, see
    with_unrelated.
    """

    keys: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    gold_margin: np.ndarray
    score_margin: np.ndarray
    flipped: np.ndarray
    scored: np.ndarray | None = None
    tail_weight: float = 1.0
    with_scores: bool = False
    unrelated: PairTable | None = None

    @classmethod
    def of(cls, pairs: Iterable[EncodedPair], score_margins: Iterable[float] = ()) -> PairTable:
        """Build a table from pairs; score_margins: one per pair, or empty if unknown."""
        pairs = list(pairs)
        as_annotated = [p.flip() if p.flipped else p for p in pairs]
        lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in as_annotated], np.int32)
        lengths = lengths.reshape(-1, 3)
        return cls(
            keys=np.array([p.key.encode() for p in pairs], "S32"),
            tokens=flat([part for p in as_annotated for part in (p.prompt, p.chosen, p.rejected)]),
            starts=starts_of(lengths),
            lengths=lengths,
            gold_margin=np.array([p.gold_margin for p in as_annotated], np.float32),
            score_margin=np.array(list(score_margins) or [math.nan] * len(pairs), np.float32),
            flipped=np.array([p.flipped for p in pairs], bool),
            scored=scored_of(as_annotated),
            tail_weight=pairs[0].tail_weight if pairs else 1.0,
        )

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, at: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, at: slice) -> PairTable: ...
    def __getitem__(self, at: int | slice) -> EncodedPair | PairTable:
        if isinstance(at, slice):
            return self.select(at)
        start, (prompt, chosen, rejected) = int(self.starts[at]), self.lengths[at].tolist()
        first, second = start + prompt, start + prompt + chosen
        pair = EncodedPair(
            self.key(at),
            self.tokens[start:first],
            self.tokens[first:second],
            self.tokens[second : second + rejected],
            float(self.gold_margin[at]),
            scored=None
            if self.scored is None
            else (self.scored[first:second], self.scored[second : second + rejected]),
            tail_weight=self.tail_weight,
            score_gap=float(self.score_gap[at]) if self.with_scores else None,
            unrelated=None if self.unrelated is None else self.unrelated[at],
        )
        return pair.flip() if self.flipped[at] else pair

    def key(self, at: int) -> str:
        """Return the key of a pair as a string."""
        return self.keys[at].decode()

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens of each pair, prompt counted once, [N]."""
        return self.lengths.sum(1)

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of tokens of chosen and rejected under the current labels, [N, 2]."""
        return np.where(self.flipped[:, None], self.lengths[:, :0:-1], self.lengths[:, 1:])

    @property
    def is_one_sided(self) -> np.ndarray:
        """Which pairs have one response only, chosen if it is desirable, else rejected, or none, [N]."""
        return (self.lengths[:, 1:] == 0).any(1)

    @property
    def is_prompt(self) -> np.ndarray:
        """Which pairs are prompts alone, [N]."""
        return (self.lengths[:, 1:] == 0).all(1)

    def with_responses(self) -> PairTable:
        """Return the pairs that have a response, without prompts that stand alone."""
        return self.select(~self.is_prompt)

    @cached_property
    def score_gap(self) -> np.ndarray:
        """Difference of chosen and rejected, as annotated, in gold reward, else in the scores that came with them, [N]; NaN if
        neither is known.
        """
        return np.where(np.isnan(self.gold_margin), self.score_margin, self.gold_margin)

    def select(self, rows: slice | np.ndarray) -> PairTable:
        """Return some of the pairs, by index or mask, without copying tokens."""
        unrelated = None if self.unrelated is None else self.unrelated.select(rows)
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        return replace(self, **columns, unrelated=unrelated)

    def with_unrelated(self) -> PairTable:
        """Return the same pairs, each with a row of its prompt and a response of another pair, the next one by key: of its two
        responses every other pair gives the chosen one, as annotated. A row has at most as many tokens as the longest pair.
        """
        order = np.argsort(self.keys, kind="stable")
        of, side = np.empty_like(order), np.empty_like(order)
        of[order], side[order] = np.roll(order, -1), np.arange(len(order)) % 2
        side = np.where(self.lengths[of, side + 1] > 0, side, 1 - side)
        longest = (self.lengths[:, 0] + self.lengths[:, 1:].max(1)).max(initial=0)
        keys = [b"%s to %s" % pair for pair in zip(self.keys[of].tolist(), self.keys.tolist(), strict=True)]
        return replace(
            self, unrelated=self._single(np.arange(len(self)), of, side, [_key(key) for key in keys], longest)
        )

    def flip(self, mask: np.ndarray) -> PairTable:
        """Return the same pairs with chosen and rejected swapped where the mask is True."""
        return replace(self, flipped=self.flipped ^ mask)

    def concat(self, other: PairTable) -> PairTable:
        """Return the concatenation of two tables."""
        shared = self.tokens is other.tokens
        tokens = self.tokens if shared else np.concatenate([self.tokens, other.tokens])
        scored = self.scored
        if not shared and (self.scored is not None or other.scored is not None):
            scored = np.concatenate(
                [each._all_scored if each.scored is None else each.scored for each in (self, other)]
            )
        shifted = other if shared else replace(other, starts=other.starts + len(self.tokens))
        joined = {name: np.concatenate([getattr(self, name), getattr(shifted, name)]) for name in COLUMNS}
        unrelated = None
        if self.unrelated is not None and other.unrelated is not None:
            unrelated = self.unrelated.concat(other.unrelated)
        return replace(self, **joined, tokens=tokens, scored=scored, unrelated=unrelated)

    def unpair(self) -> PairTable:
        """Return both responses of each pair as rows of one response, the chosen one first; their tokens are copied.

        The key of a row depends on that of the pair and on the side alone.
        """
        at, side = np.nonzero(self.lengths[:, 1:])  # of each response
        own = self.is_one_sided[at].tolist()
        keys = [
            key if is_own else side_key(key, of)
            for key, of, is_own in zip(self.keys[at].tolist(), side.tolist(), own, strict=True)
        ]
        return replace(self._single(at, at, side, keys), flipped=self.flipped[at])

    def _single(
        self, at: np.ndarray, of: np.ndarray, side: np.ndarray, keys: Sequence[bytes], most: int | None = None
    ) -> PairTable:
        """Return rows of one response, of at most `most` tokens: the prompt of pair at[i], response side[i] of pair of[i]."""
        sizes = self.lengths[of, side + 1]
        if most is not None:
            sizes = np.minimum(sizes, most - self.lengths[at, 0])
        lengths = np.zeros((len(at), 3), np.int32)
        lengths[:, 0], lengths[np.arange(len(at)), side + 1] = self.lengths[at, 0], sizes
        responses = self.starts[of] + self.lengths[of, 0] + side * self.lengths[of, 1]
        spans = np.stack((self.starts[at], lengths[:, 0], responses, sizes), 1).tolist()

        def copied(column: np.ndarray) -> np.ndarray:
            column = np.asarray(column)  # not a memmap, whose slices are slow to create
            parts = (column[begin : begin + size] for p, n, r, m in spans for begin, size in ((p, n), (r, m)))
            return np.concatenate([column[:0], *parts])

        return PairTable(
            keys=np.array(keys, "S32"),
            tokens=copied(self.tokens),
            starts=starts_of(lengths),
            lengths=lengths,
            gold_margin=np.full(len(at), math.nan, np.float32),
            score_margin=np.full(len(at), math.nan, np.float32),
            flipped=np.zeros(len(at), bool),
            scored=None if self.scored is None else copied(self.scored),
        )

    def chosen_only(self) -> PairTable:
        """Return the distinct chosen responses, before label noise, with empty rejected responses."""
        lengths = self.lengths * np.array([1, 1, 0], np.int32)
        ends = self.starts + lengths.sum(1)
        content = [
            hashlib.blake2b(b"%d " % prompt + self.tokens[start:end].tobytes(), digest_size=16).hexdigest()
            for prompt, start, end in zip(lengths[:, 0].tolist(), self.starts.tolist(), ends.tolist(), strict=True)
        ]
        _, first = np.unique(np.array(content, "S32"), return_index=True)
        chosen = replace(self, lengths=lengths, flipped=np.zeros(len(self), bool))
        return chosen.select(np.sort(first[chosen.lengths[first, 1] > 0]))

    def digest(self) -> str:
        """Return a hash of the keys in order, of the token ids, and of which pairs label noise flipped."""
        digest = hashlib.blake2b(digest_size=16)
        for column in (self.keys, self.lengths, self.flipped):
            digest.update(np.ascontiguousarray(column).tobytes())
        tokens = np.asarray(self.tokens)  # not a memmap, whose slices are slow to create
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            digest.update(tokens[start : start + size].tobytes())
            if self.scored is not None:
                digest.update(self.scored[start : start + size].tobytes())
        return digest.hexdigest()

    @property
    def _all_scored(self) -> np.ndarray:
        return np.ones(len(self.tokens), bool)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, in which a memory-mapped file is replaced by its path."""
        state = dict(self.__dict__)
        for name in MAPPED:
            if isinstance(state[name], np.memmap):
                state[name] = Path(str(state[name].filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, dtype in MAPPED.items():
            if isinstance(state[name], Path):
                state[name] = np.memmap(state[name], dtype, "r")
        self.__dict__.update(state)


def flat(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Concatenate token ids, as int32."""
    return np.concatenate([np.empty(0, np.int32), *parts], dtype=np.int32, casting="unsafe")


def scored_of(pairs: Sequence[EncodedPair]) -> np.ndarray | None:
    """Return which of the pairs' tokens are scored if they belong to a response, [T] bool; None if all are."""
    if all(pair.scored is None for pair in pairs):
        return None
    every = [(np.ones(len(p.prompt), bool), *(p.scored or map(np.ones_like, (p.chosen, p.rejected)))) for p in pairs]
    return np.concatenate([part for parts in every for part in parts], dtype=bool, casting="unsafe")


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Return the offset of each pair when pairs of these lengths [N, 3] are concatenated, [N] int64."""
    sizes = lengths.sum(1, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def side_key(key: bytes, side: int) -> bytes:
    """Return the key of the row that `unpair` makes of a pair's response: 0 chosen, 1 rejected."""
    return _key(b"%s/%d" % (key, side))


def _key(content: bytes) -> bytes:
    """Return the key of a row that was made from pairs."""
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def prompt_groups(pairs: Iterable[EncodedPair]) -> np.ndarray:
    """Return the index of each pair's prompt among the distinct ones, [N]: pairs of one prompt are not independent."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(np.asarray(p.prompt, np.int64).tobytes(), len(seen)) for p in pairs], np.int64)
