"""Data quality in numbers: lengths, repeats, contradictions, leaks between splits, and how well length predicts the
label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.token_hashes import counts_of_equal, mixed, pass_over
from dpo_lab.stats.estimates import Estimate, share_in_groups

if TYPE_CHECKING:
    from dpo_lab.data.tokenize import PairTokenizer

PARTS = ("prompt", "chosen", "rejected")
BINS = 24


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of prompts, of chosen or of rejected responses. histogram: pairs per bin, see Quality.bins.

    truncated: the share of responses that were truncated at their end; for prompts the share of those with the maximum
    length, nearly all of which were truncated at their start.
    """

    mean: float
    median: float
    p95: float
    most: int
    truncated: float
    histogram: list[int]


@dataclass(frozen=True)
class Margins:
    """Statistics of the score of chosen minus that of rejected, over pairs where both are known; negative, zero:
    shares.
    """

    known: int
    mean: float
    median: float
    negative: float
    zero: float


@dataclass(frozen=True)
class Side:
    """Statistics of one split of the pairs under their current labels, label noise included. Texts are compared as
    token ids.

    prompts: number of distinct prompts; most_of_a_prompt: pairs of the most frequent prompt; repeated: pairs that
    repeat another; contradictions: pairs with a contradicting pair, where both count as one; responses: number of
    distinct responses; shared_responses: share of responses that occur in another pair too; special_inside: responses
    with a special token before their end; lengths: for each of PARTS; chosen_longer: share of pairs whose chosen
    response has more tokens, where a tie counts half, with an interval clustered by prompt; same_length: share of ties;
    difference: mean of tokens of chosen minus tokens of rejected; differences: its histogram; scores: margins of the
    scores that came with the pairs; truth: margins of the task's gold reward. unpaired: rows of one response among the
    pairs, desirable and undesirable ones; what compares two responses leaves them out, and is None where nothing is left.
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
    chosen_longer: Estimate | None
    same_length: float | None
    difference: float | None
    differences: list[int]
    scores: Margins | None
    truth: Margins | None
    unpaired: tuple[int, int]


@dataclass(frozen=True)
class Noise:
    """The effect of label noise on the training pairs, by which response was the longer one before, or the only one.

    flipped: {"chosen longer": [pairs, flipped ones], ...}; chosen_longer: see Side, before label noise.
    """

    flipped: dict[str, list[int]]
    chosen_longer: Estimate | None

    @property
    def total(self) -> int:
        return sum(flipped for _, flipped in self.flipped.values())


@dataclass(frozen=True)
class Quality:
    """The quality of training and held-out pairs.

    counts: number of rows, and of dropped ones by reason; leaks_dropped: training rows left out because their prompt is
    held out; leaks: remaining training pairs whose prompt has the same token ids as a held-out one; bins: edges of the
    histograms of prompts, responses and differences; a bin includes its lower edge.
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
        """The statistics by split, without held-out pairs if there are none."""
        return {"train": self.train} | ({"held-out": self.held_out} if self.held_out else {})

    def as_record(self) -> dict[str, Any]:
        """Return plain values for the run record."""
        return asdict(self)


def quality_of(train: PairTable, held_out: PairTable, counts: Mapping[str, int], encoder: PairTokenizer) -> Quality:
    """Compute the quality of pairs, encoded by `encoder`. counts: see Splits."""
    tables = [table for table in (train, held_out) if len(table)]
    bins = {
        "prompt": _edges(max(int(t.lengths[:, 0].max()) for t in tables)),
        "response": _edges(max(int(t.lengths[:, 1:].max()) for t in tables)),
        "difference": _edges_around_zero(max(int(np.abs(_differences(t)).max(initial=0)) for t in tables)),
    }
    passes = [_QualityPass(table, encoder) for table in tables]
    leaks = np.isin(passes[0].hashes[:, 0], passes[1].hashes[:, 0]) if len(passes) > 1 else np.zeros(0, bool)
    return Quality(
        counts={what: int(count) for what, count in counts.items()},
        max_length=encoder.max_length,
        max_prompt_length=encoder.max_prompt_length,
        leaks_dropped=int(counts.get("dropped: prompt is held out", 0)),
        leaks=int(leaks.sum()),
        bins=bins,
        train=passes[0].side(bins),
        held_out=passes[1].side(bins) if len(passes) > 1 else None,
        noise=passes[0].noise(),
    )


class _QualityPass:
    """A table of pairs with the results of one pass over its tokens.

    hashes [N, 3]: hashes of the token ids of prompt, chosen and rejected as annotated; special [N, 3]: number of
    special tokens in each; groups [N]: index of each pair's prompt among the distinct ones.
    """

    def __init__(self, table: PairTable, encoder: PairTokenizer) -> None:
        self.table, self.encoder = table, encoder
        special = np.fromiter(encoder.special_ids, np.int64)
        self.hashes, self.special = pass_over(table, special)
        ends = table.starts[:, None] + np.cumsum(table.lengths, axis=1)
        last, is_there = np.asarray(table.tokens[ends[:, 1:] - 1]), table.lengths[:, 1:] > 0
        self.special[:, 1:] -= np.isin(last, special) & is_there
        self.cut = encoder.is_truncated(table.lengths[:, :1], table.lengths[:, 1:], last)
        _, self.groups, self.of_a_prompt = np.unique(self.hashes[:, 0], return_inverse=True, return_counts=True)

    def side(self, bins: Mapping[str, list[int]]) -> Side:
        table = self.table
        prompt, chosen, rejected = self.hashes.T
        distinct = len(counts_of_equal(mixed(prompt, chosen, rejected)))
        unordered = len(counts_of_equal(mixed(prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected))))
        is_there = table.lengths[:, 1:] > 0
        of_a_response = counts_of_equal(self.hashes[:, 1:][is_there])
        differences = _differences(table)
        cut = np.where(table.flipped[:, None], self.cut[:, ::-1], self.cut)
        parts = {
            "prompt": (table.lengths[:, 0], table.lengths[:, 0] >= self.encoder.max_prompt_length, bins["prompt"]),
            "chosen": (table.response_lengths[:, 0], cut[:, 0], bins["response"]),
            "rejected": (table.response_lengths[:, 1], cut[:, 1], bins["response"]),
        }
        sign = np.where(table.flipped, -1, 1)
        return Side(
            pairs=len(table),
            prompts=len(self.of_a_prompt),
            most_of_a_prompt=int(self.of_a_prompt.max()),
            repeated=len(table) - distinct,
            contradictions=distinct - unordered,
            responses=len(of_a_response) if is_there.any() else 0,
            shared_responses=float(of_a_response[of_a_response > 1].sum()) / max(1, int(is_there.sum())),
            special_inside=int((self.special[:, 1:] > 0).sum()),
            lengths={part: _lengths(*columns) for part, columns in parts.items()},
            chosen_longer=self._longer(differences),
            same_length=float((differences == 0).mean()) if len(differences) else None,
            difference=float(differences.mean()) if len(differences) else None,
            differences=np.histogram(differences, bins["difference"])[0].tolist(),
            scores=_margins(table.score_margin * sign),
            truth=_margins(table.gold_margin * sign),
            unpaired=_unpaired(table.response_lengths),
        )

    def noise(self) -> Noise:
        before = _differences(self.table, before_noise=True)
        one_sided, (_, chosen, rejected) = self.table.is_one_sided, self.table.lengths.T
        flips = self.table.flipped[~one_sided]
        kinds = {"chosen longer": before > 0, "chosen shorter": before < 0, "same length": before == 0}
        flipped = {kind: [int(mask.sum()), int(flips[mask].sum())] for kind, mask in kinds.items()}
        if one_sided.any():
            kinds = {"desirable": one_sided & (chosen > 0), "undesirable": one_sided & (rejected > 0)}
            flipped |= {kind: [int(mask.sum()), int(self.table.flipped[mask].sum())] for kind, mask in kinds.items()}
        return Noise(flipped, self._longer(before))

    def _longer(self, differences: np.ndarray) -> Estimate | None:
        if not len(differences):
            return None
        _, groups = np.unique(self.groups[~self.table.is_one_sided], return_inverse=True)
        return share_in_groups(np.heaviside(differences, 0.5), groups)


def _differences(table: PairTable, before_noise: bool = False) -> np.ndarray:
    """Return tokens of chosen minus tokens of rejected, of the pairs that have both, [N]."""
    sides = (table.lengths[:, 1:] if before_noise else table.response_lengths)[~table.is_one_sided]
    return sides[:, 0].astype(np.int64) - sides[:, 1]


def _unpaired(lengths: np.ndarray) -> tuple[int, int]:
    chosen, rejected = (lengths > 0).T
    return int((chosen & ~rejected).sum()), int((rejected & ~chosen).sum())


def _edges(most: int) -> list[int]:
    """Return edges of at most BINS bins of equal integer width for 0 .. most."""
    width = math.ceil((most + 1) / BINS)
    return list(range(0, most + width + 1, width))


def _edges_around_zero(most: int) -> list[int]:
    """Return edges of at most BINS bins of equal odd width for -most .. most, one of which is centred at 0."""
    half = math.ceil(max(0, 2 * most - BINS + 2) / (2 * BINS - 2))
    width = 2 * half + 1
    a_side = math.ceil(max(0, most - half) / width)
    return list(range(-half - a_side * width, half + 1 + a_side * width + 1, width))


def _lengths(tokens: np.ndarray, cut: np.ndarray, edges: list[int]) -> Lengths:
    tokens, cut = tokens[tokens > 0], cut[tokens > 0]  # without responses that there are not
    if not len(tokens):
        return Lengths(0.0, 0.0, 0.0, 0, 0.0, [0] * (len(edges) - 1))
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
