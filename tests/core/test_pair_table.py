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
