"""Pairs as columns: each is what it was, selection copies no tokens, noise swaps sides, a mapped file travels by name."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from tests.conftest import make_pairs

PAIRS = [pair.flip() if i % 3 == 0 else pair for i, pair in enumerate(make_pairs(10))]


def plain(pair: EncodedPair) -> tuple:
    sides = (pair.prompt, pair.chosen, pair.rejected)
    return (
        pair.key,
        *([int(t) for t in side] for side in sides),
        pytest.approx(pair.gold_margin, nan_ok=True),
        pair.flipped,
    )


@pytest.fixture
def table() -> PairTable:
    return PairTable.of(PAIRS)


def test_every_pair_is_what_it_was(table):
    assert len(table) == 10
    assert [plain(pair) for pair in table] == [plain(pair) for pair in PAIRS]
    assert plain(table[-1]) == plain(PAIRS[-1])
    assert table.sizes.tolist() == [pair.size for pair in PAIRS]
    assert table.response_lengths.tolist() == [[len(pair.chosen), len(pair.rejected)] for pair in PAIRS]
    with pytest.raises(IndexError):
        table[10]


def test_a_selection_copies_no_tokens(table):
    mask = np.arange(10) % 2 == 1
    for part, expected in ((table[2:7:2], PAIRS[2:7:2]), (table.select(mask), PAIRS[1::2])):
        assert part.tokens is table.tokens
        assert [plain(pair) for pair in part] == [plain(pair) for pair in expected]


def test_joined_tables_share_tokens_or_bring_their_own(table):
    halves = table[:4].concat(table[4:])
    assert halves.tokens is table.tokens
    others = make_pairs(3, seed=5)
    for both, expected in ((halves, PAIRS), (table.concat(PairTable.of(others)), [*PAIRS, *others])):
        assert [plain(pair) for pair in both] == [plain(pair) for pair in expected]


def test_flips(table):
    mask = np.arange(10) < 4
    assert [plain(pair) for pair in table.flip(mask)] == [plain(p.flip() if i < 4 else p) for i, p in enumerate(PAIRS)]
    assert [plain(pair) for pair in table.flip(mask).flip(mask)] == [plain(pair) for pair in PAIRS]


def test_collated_it_is_the_same_batch(table):
    ours, theirs = collate([table[i] for i in range(10)]), collate(PAIRS)
    assert ours.keys == theirs.keys
    assert np.array_equal(ours.lengths, theirs.lengths)
    for name in ("tokens", "response_lengths", "flipped"):
        assert getattr(ours, name).equal(getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert ours.gold_margin.nan_to_num(9).equal(theirs.gold_margin.nan_to_num(9))


def test_a_mapped_file_travels_by_name(table, tmp_path):
    table.tokens.tofile(tmp_path / "tokens.bin")
    mapped = PairTable(
        table.keys, np.memmap(tmp_path / "tokens.bin", np.int32, "r"), *(getattr(table, n) for n in COLUMNS)
    )
    sent = pickle.dumps(mapped)
    assert len(sent) < 3000 + table.keys.nbytes
    arrived = pickle.loads(sent)
    assert isinstance(arrived.tokens, np.memmap)
    assert [plain(pair) for pair in arrived] == [plain(pair) for pair in PAIRS]


COLUMNS = ("starts", "lengths", "gold_margin", "score_margin", "flipped")


def test_no_pairs():
    empty = PairTable.of([])
    assert len(empty) == 0
    assert list(empty) == []
    assert empty.sizes.tolist() == []
    assert empty.response_lengths.shape == (0, 2)


def rows_of(pair: EncodedPair) -> tuple[list[int], list[int]]:
    """Prompt and response of a row of one response."""
    row = pair.unrelated
    assert row is not None
    assert len(row.chosen) * len(row.rejected) == 0
    return [int(t) for t in row.prompt], [int(t) for t in (*row.chosen, *row.rejected)]


def test_unrelated_rows_are_each_prompt_with_a_response_of_the_next_pair(table):
    """As annotated, of either side in turn; whatever the order of pairs, and whichever of them noise flips."""
    with_rows = table.with_unrelated()
    annotated = [pair.flip() if pair.flipped else pair for pair in PAIRS]
    order = sorted(range(10), key=lambda i: PAIRS[i].key)
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in PAIRS)
    for rank, at in enumerate(order):
        other = annotated[order[(rank + 1) % 10]]
        response = (other.chosen, other.rejected)[rank % 2]
        prompt = list(PAIRS[at].prompt)
        assert rows_of(with_rows[at]) == (prompt, list(response)[: longest - len(prompt)])
    expected = {pair.key: rows_of(pair) for pair in with_rows}
    for other in (table.select(np.arange(9, -1, -1)), table.flip(np.arange(10) < 5)):
        assert {pair.key: rows_of(pair) for pair in other.with_unrelated()} == expected
    part = with_rows[2:7:2].concat(with_rows[:1]).concat(PairTable.of(make_pairs(3, seed=5)).with_unrelated())
    assert [rows_of(pair) for pair in part[:4]] == [expected[PAIRS[i].key] for i in (2, 4, 6, 0)]
    assert len(set(with_rows.unrelated.keys.tolist()) | set(table.keys.tolist())) == 20
    assert table[0].unrelated is None
    assert table.concat(with_rows).unrelated is None
    assert pickle.loads(pickle.dumps(with_rows))[3].unrelated.key == with_rows[3].unrelated.key
    assert len(PairTable.of([]).with_unrelated().unrelated) == 0


def test_unrelated_rows_of_single_responses_hold_the_one_that_there_is():
    rows = PairTable.of(make_pairs(6)).unpair()
    found = rows.with_unrelated()
    order = np.argsort(rows.keys)
    for at, of in zip(order, np.roll(order, -1), strict=True):
        other = rows[int(of)]
        response = [int(t) for t in (*other.chosen, *other.rejected)]
        prompt, mismatched = rows_of(found[int(at)])
        assert mismatched == response[: len(mismatched)]
        assert mismatched
        assert prompt == list(rows[int(at)].prompt)


def test_scored_tokens_stay_scored_in_rows_of_one_response():
    scored = np.array([True, False, True]), np.array([False, True])
    table = PairTable.of([EncodedPair("a", [1], [2, 3, 4], [5, 6], scored=scored), *make_pairs(2)])
    first, second = table.unpair()[:2]
    assert first.token_weights.tolist() == [1, 0, 1]
    assert second.token_weights.tolist() == [0, 1]


def test_the_gap_of_scores_is_of_gold_rewards_where_they_are_known():
    pairs = [EncodedPair("a", [1], [2], [3], 0.5), EncodedPair("b", [1], [2], [4]), EncodedPair("c", [1], [2], [5])]
    table = PairTable.of(pairs, [9.0, -2.0, float("nan")])
    assert table.score_gap.tolist() == pytest.approx([0.5, -2, float("nan")], nan_ok=True)
    assert table[0].score_gap is None
    flipped = replace(table, with_scores=True).flip(np.array([True, False, False]))
    assert [pair.score_gap for pair in flipped[:2]] == [-0.5, -2]
    assert collate(flipped[:2]).score_gap.tolist() == [-0.5, -2]
    assert collate(table[:2]).score_gap is None


def test_a_digest_is_of_the_token_ids_of_these_pairs(table):
    """Other tokens under the same keys and lengths are other pairs; where they lie does not matter."""
    token = table.tokens.copy()
    token[int(table.starts[3])] += 1
    other = replace(table, tokens=token)
    assert other.digest() != table.digest()
    assert other[:3].digest() == table[:3].digest()
    assert PairTable.of(list(table[4:])).digest() == table[4:].digest()
    digests = {table.digest(), table[::-1].digest(), table[1:].digest(), table.flip(np.arange(10) < 1).digest()}
    assert len(digests) == 4
