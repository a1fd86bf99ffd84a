"""Data quality in numbers: lengths, repeats, contradictions, leaks between splits, and how well length predicts the
label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pair_table import PairTable
from dpo_lab.stats.estimates import Estimate, share_in_groups

if TYPE_CHECKING:
    from dpo_lab.data.tokenize import PairTokenizer

PARTS = ("prompt", "chosen", "rejected")
BINS = 24
BLOCK = 1 << 18  # tokens that are looked at at once: what fits a core's cache


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part of all pairs. histogram: pairs in each bin, see Quality.bins.

    truncated: the share of responses that were cut at their end; of prompts the share of those as long as a prompt may
    be, nearly all of which were cut at their start.
    """

    mean: float
    median: float
    p95: float
    most: int
    truncated: float
    histogram: list[int]


@dataclass(frozen=True)
class Margins:
    """Scores of chosen less those of rejected, where they are known; negative, zero: shares of those."""

    known: int
    mean: float
    median: float
    negative: float
    zero: float


@dataclass(frozen=True)
class Side:
    """One split of the pairs, as they are labelled now, label noise included. Equality is that of token ids.

    prompts: distinct ones; most_of_a_prompt: pairs of the most frequent one; repeated: pairs that say what another
    says; contradictions: pairs whose contrary is there as well, counted once for both; responses: distinct ones;
    shared_responses: share of responses that stand in another pair too; special_inside: responses that hold a special
    token before their end; lengths: of each of PARTS; chosen_longer: share of pairs whose chosen has more tokens, a tie
    half, pairs of one prompt being alike; same_length: share of ties; difference: tokens of chosen less those of
    rejected, mean; differences: the histogram of that; scores: those that came with the pairs; truth: the world's gold
    reward.
    """

    pairs: int
    prompts: int
    most_of_a_prompt: int
    repeated: int
    contradictions: int
    responses: int
    shared_responses: float
    special_inside: int
    lengths: dict[str, Lengths]
    chosen_longer: Estimate
    same_length: float
    difference: float
    differences: list[int]
    scores: Margins | None
    truth: Margins | None


@dataclass(frozen=True)
class Noise:
    """What label noise did to the training pairs, by which response was the longer one before it came.

    flipped: {"chosen longer": [pairs, flipped ones]}, and so on; chosen_longer: see Side, before it.
    """

    flipped: dict[str, list[int]]
    chosen_longer: Estimate

    @property
    def total(self) -> int:
        return sum(flipped for _, flipped in self.flipped.values())


@dataclass(frozen=True)
class Quality:
    """What is to be known of train and held-out pairs before a fit.

    counts: rows, and what became of them; leaks_dropped: training rows left out because their prompt is held out;
    leaks: training pairs left whose prompt, as the tokens that the model sees, is held out all the same; bins: edges of
    the histograms of prompts, responses and differences, the first inside a bin, the next outside.
    """

    counts: dict[str, int]
    max_length: int
    max_prompt_length: int
    leaks_dropped: int
    leaks: int
    bins: dict[str, list[int]]
    train: Side
    held_out: Side | None
    noise: Noise

    @property
    def sides(self) -> dict[str, Side]:
        """Train, and held-out where there is any."""
        return {"train": self.train} | ({"held-out": self.held_out} if self.held_out else {})

    def as_record(self) -> dict[str, Any]:
        """As plain values, for a run's record."""
        return asdict(self)


def quality_of(train: PairTable, held_out: PairTable, counts: Mapping[str, int], encoder: PairTokenizer) -> Quality:
    """The quality of pairs under the encoder that made them. counts: see Splits."""
    both = [table for table in (train, held_out) if len(table)]
    bins = {
        "prompt": _edges(max(int(t.lengths[:, 0].max()) for t in both)),
        "response": _edges(max(int(t.lengths[:, 1:].max()) for t in both)),
        "difference": _edges_around_zero(max(int(np.abs(_differences(t)).max()) for t in both)),
    }
    looks = [_QualityPass(table, encoder) for table in both]
    leaks = np.isin(looks[0].hashes[:, 0], looks[1].hashes[:, 0]) if len(looks) > 1 else np.zeros(0, bool)
    return Quality(
        counts={what: int(count) for what, count in counts.items()},
        max_length=encoder.max_length,
        max_prompt_length=encoder.max_prompt_length,
        leaks_dropped=int(counts.get("dropped: prompt is held out", 0)),
        leaks=int(leaks.sum()),
        bins=bins,
        train=looks[0].side(bins),
        held_out=looks[1].side(bins) if len(looks) > 1 else None,
        noise=looks[0].noise(),
    )


class _QualityPass:
    """A table, and what one pass over its tokens found.

    hashes [N, 3]: of the token ids of prompt, chosen and rejected as annotated; special [N, 3]: special tokens in each;
    groups [N]: the number of each pair's prompt.
    """

    def __init__(self, table: PairTable, encoder: PairTokenizer) -> None:
        self.table, self.encoder = table, encoder
        special = np.fromiter(encoder.special_ids, np.int64)
        self.hashes, self.special = _pass_over(table, special)
        ends = table.starts[:, None] + np.cumsum(table.lengths, axis=1)
        last = np.asarray(table.tokens[ends[:, 1:] - 1])
        self.special[:, 1:] -= np.isin(last, special)
        self.cut = encoder.cut(table.lengths[:, :1], table.lengths[:, 1:], last)
        _, self.groups, self.of_a_prompt = np.unique(self.hashes[:, 0], return_inverse=True, return_counts=True)

    def side(self, bins: Mapping[str, list[int]]) -> Side:
        table = self.table
        prompt, chosen, rejected = self.hashes.T
        said = len(_runs(_mixed(prompt, chosen, rejected)))
        compared = len(_runs(_mixed(prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected))))
        of_a_response = _runs(self.hashes[:, 1:].ravel())
        differences = _differences(table)
        cut = np.where(table.flipped[:, None], self.cut[:, ::-1], self.cut)
        parts = {
            "prompt": (table.lengths[:, 0], table.lengths[:, 0] >= self.encoder.max_prompt_length, bins["prompt"]),
            "chosen": (table.sides[:, 0], cut[:, 0], bins["response"]),
            "rejected": (table.sides[:, 1], cut[:, 1], bins["response"]),
        }
        sign = np.where(table.flipped, -1, 1)
        return Side(
            pairs=len(table),
            prompts=len(self.of_a_prompt),
            most_of_a_prompt=int(self.of_a_prompt.max()),
            repeated=len(table) - said,
            contradictions=said - compared,  # two responses are compared one way, or both ways
            responses=len(of_a_response),
            shared_responses=float(of_a_response[of_a_response > 1].sum()) / (2 * len(table)),
            special_inside=int((self.special[:, 1:] > 0).sum()),
            lengths={part: _lengths(*columns) for part, columns in parts.items()},
            chosen_longer=self._longer(differences),
            same_length=float((differences == 0).mean()),
            difference=float(differences.mean()),
            differences=np.histogram(differences, bins["difference"])[0].tolist(),
            scores=_margins(table.score_margin * sign),
            truth=_margins(table.gold_margin * sign),
        )

    def noise(self) -> Noise:
        before = _differences(self.table, before_noise=True)
        kinds = {"chosen longer": before > 0, "chosen shorter": before < 0, "same length": before == 0}
        flipped = {kind: [int(mask.sum()), int(self.table.flipped[mask].sum())] for kind, mask in kinds.items()}
        return Noise(flipped, self._longer(before))

    def _longer(self, differences: np.ndarray) -> Estimate:
        return share_in_groups((np.sign(differences) + 1) / 2, self.groups)


def _pass_over(table: PairTable, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the three parts of each pair, and how many special tokens each part holds, both [N, 3].

    A hash is the sum over a part's tokens of a random number of the token times a random odd number of its place.
    """
    vocabulary, longest = 1 + max(int(table.tokens.max()), int(special.max(initial=0))), int(table.lengths.max())
    of_token = _scrambled(np.arange(vocabulary, dtype=np.uint64))
    of_place = _scrambled(np.arange(longest, dtype=np.uint64) + np.uint64(1 << 40)) | np.uint64(1)
    is_special = np.zeros(vocabulary, np.int64)
    is_special[special] = 1
    lengths = table.lengths.astype(np.int64)
    hashes, specials = np.zeros(lengths.shape, np.uint64), np.zeros(lengths.shape, np.int64)
    block_of = np.cumsum(table.sizes, dtype=np.int64) // BLOCK
    borders = [0, *(np.flatnonzero(np.diff(block_of)) + 1).tolist(), len(table)]
    for first, end in pairwise(borders):
        block = lengths[first:end].ravel()
        sizes = lengths[first:end].sum(1)
        starts = np.cumsum(block) - block  # of each part, in the block
        row = np.arange(int(sizes.sum()))
        ids = table.tokens[row + np.repeat(table.starts[first:end] - starts[::3], sizes)]
        place = row - np.repeat(starts, block)
        there = block > 0  # reduceat gives no 0 for an empty part
        for out, values in ((hashes, of_token[ids] * of_place[place]), (specials, is_special[ids])):
            out[first:end].reshape(-1)[there] = np.add.reduceat(values, starts[there])
    return hashes, specials


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """64-bit numbers to such as look random (splitmix64: Steele, Lea and Flood 2014)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mixed(prompt: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A hash of three hashes in this order."""
    return _scrambled(_scrambled(_scrambled(prompt) ^ first) ^ second)


def _runs(hashes: np.ndarray) -> np.ndarray:
    """How often each distinct value is there. By sorting, which takes a tenth of np.unique's time."""
    ordered = np.sort(hashes)
    return np.diff(np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]))


def _differences(table: PairTable, before_noise: bool = False) -> np.ndarray:
    """Tokens of chosen less those of rejected, [N]."""
    sides = table.lengths[:, 1:] if before_noise else table.sides
    return sides[:, 0].astype(np.int64) - sides[:, 1]


def _edges(most: int) -> list[int]:
    """Edges of at most BINS bins of equal whole width for 0 .. most."""
    width = math.ceil((most + 1) / BINS)
    return list(range(0, most + width + 1, width))


def _edges_around_zero(most: int) -> list[int]:
    """Edges of at most BINS bins of equal odd width for -most .. most, one of which has 0 in its middle."""
    half = math.ceil(max(0, 2 * most - BINS + 2) / (2 * BINS - 2))
    width = 2 * half + 1
    a_side = math.ceil(max(0, most - half) / width)
    return list(range(-half - a_side * width, half + 1 + a_side * width + 1, width))


def _lengths(tokens: np.ndarray, cut: np.ndarray, edges: list[int]) -> Lengths:
    return Lengths(
        mean=float(tokens.mean()),
        median=float(np.median(tokens)),
        p95=float(np.percentile(tokens, 95)),
        most=int(tokens.max()),
        truncated=float(cut.mean()),
        histogram=np.histogram(tokens, edges)[0].tolist(),
    )


def _margins(margins: np.ndarray) -> Margins | None:
    known = margins[~np.isnan(margins)].astype(np.float64)
    if not len(known):
        return None
    return Margins(
        known=len(known),
        mean=float(known.mean()),
        median=float(np.median(known)),
        negative=float((known < 0).mean()),
        zero=float((known == 0).mean()),
    )
