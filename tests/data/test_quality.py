"""The quality of pairs: numbers worked by hand, brute-force twins, planted faults found exactly, advice at its thresholds."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.quality import BINS, Margins, Quality, _edges, _edges_around_zero, quality_of
from dpo_lab.data.row_faults import DESCRIPTIONS
from dpo_lab.data.sources import Contradictions, Data, Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.warnings import data_warnings
from dpo_lab.stats.estimates import share, share_in_groups
from tests.conftest import make_pairs

END = 1  # of the fixture's tokenizer; its begin token is 0


@pytest.fixture
def encoder(policy) -> PairTokenizer:
    assert policy.tokenizer.convert_ids_to_tokens([0, 1]) == ["<|begin|>", "<|end|>"]
    return PairTokenizer(policy.tokenizer, 40, 8)


def table(*pairs: tuple[list[int], list[int], list[int]], scores=()) -> PairTable:
    encoded = [EncodedPair(f"{i}", prompt, chosen, rejected) for i, (prompt, chosen, rejected) in enumerate(pairs)]
    return PairTable.of(encoded, scores)


def test_numbers_worked_by_hand(encoder):
    a, b, c = [5, 6, END], [7, END], [8, 9, 10, END]
    train = table(
        ([0, 3], a, b),  # longer by 1
        ([0, 3], b, a),  # its contrary, shorter by 1
        ([0, 4, 5, 5, 5, 5, 5, 5], c, b),  # longer by 2; its prompt is as long as may be
        ([0, 4], [8, 0, 9], [8, END, 9, END]),  # shorter by 1; cut, and a special token inside each
        ([0, 4], [8, 0, 9], [8, END, 9, END]),  # says the same again
        scores=[1.0, -2.0, 0.0, 4.0, math.nan],
    )
    held_out = table(([0, 4], [11, END], [12, END]))
    found = quality_of(train, held_out, {"rows": 9, "dropped: prompt is held out": 3}, encoder)
    side = found.train
    assert (side.pairs, side.prompts, side.most_of_a_prompt) == (5, 3, 2)
    assert (side.repeated, side.contradictions) == (1, 1)
    assert side.responses == 5  # a, b, c and the two of the last pairs
    assert side.shared_responses == 9 / 10  # all but c
    assert side.special_inside == 4
    assert (found.leaks_dropped, found.leaks) == (3, 2)  # [0, 4] is held out
    prompt, chosen, rejected = (side.lengths[part] for part in ("prompt", "chosen", "rejected"))
    assert (prompt.mean, prompt.median, prompt.most, prompt.truncated) == (16 / 5, 2, 8, 1 / 5)
    assert (chosen.mean, chosen.median, chosen.most, chosen.truncated) == (3, 3, 4, 2 / 5)
    assert (rejected.mean, rejected.p95, rejected.truncated) == (3, 4, 0)
    assert (side.chosen_longer.value, side.same_length, side.difference) == (2 / 5, 0, 0)
    assert found.bins["response"] == [0, 1, 2, 3, 4, 5]
    assert (chosen.histogram, rejected.histogram) == ([0, 0, 1, 3, 1], [0, 0, 2, 1, 2])
    assert (found.bins["difference"], side.differences) == ([-2, -1, 0, 1, 2, 3], [0, 3, 0, 1, 1])
    assert side.scores == Margins(known=4, mean=0.75, median=0.5, negative=0.25, zero=0.25)
    assert side.truth is None
    assert found.held_out.chosen_longer.value == 0.5  # a tie
    assert found.held_out.same_length == 1
    assert json.loads(json.dumps(found.as_record(), allow_nan=False))["train"]["scores"]["mean"] == 0.75


def test_label_noise_is_told_by_which_was_longer(encoder):
    short, long = [5, END], [5, 6, END]
    before = table(([0, 3], long, short), ([0, 4], long, short), ([0, 5], short, long), ([0, 6], short, [6, END]))
    after = before.flip(np.array([True, False, True, False]))
    found = quality_of(after, before, {}, encoder)
    assert found.noise.flipped == {"chosen longer": [2, 1], "chosen shorter": [1, 1], "same length": [1, 0]}
    assert found.noise.total == 2
    assert found.noise.chosen_longer.value == found.held_out.chosen_longer.value == 2.5 / 4
    assert found.train.chosen_longer.value == 2.5 / 4  # one of each was swapped
    assert (found.train.lengths["chosen"].mean, found.held_out.lengths["chosen"].mean) == (2.5, 2.5)
    one = quality_of(before.flip(np.array([True, False, False, False])), before, {}, encoder)
    assert one.train.chosen_longer.value == 1.5 / 4
    assert one.train.lengths["chosen"].mean == 2.25
    assert one.train.contradictions == 0


def test_truth_is_as_labelled(encoder):
    pairs = PairTable.of([replace(pair, gold_margin=1.0) for pair in make_pairs(4)])
    found = quality_of(pairs.flip(np.array([True, False, False, False])), pairs, {}, encoder)
    assert found.train.truth == Margins(known=4, mean=0.5, median=1, negative=0.25, zero=0)
    assert found.held_out.truth == Margins(known=4, mean=1, median=1, negative=0, zero=0)


def test_brute_force_says_the_same(encoder, monkeypatch):
    """Over many pairs of few tokens, so that much repeats; in many blocks; and of a table that is a part of another."""
    monkeypatch.setattr("dpo_lab.data.token_hashes.BLOCK", 50)
    rng = np.random.default_rng(0)

    def tokens(low: int) -> list[int]:
        return rng.integers(0, 5, rng.integers(low, 4)).tolist()

    both = [(tokens(1), [*tokens(0), 5], [*tokens(0), 6]) for _ in range(600)]
    both = [pair if rng.random() < 0.5 else (pair[0], pair[2], pair[1]) for pair in both]
    mask = rng.random(600) < 0.7
    whole = table(*both)
    found = quality_of(whole.select(mask), whole.select(~mask), {}, encoder)
    said = [tuple(map(tuple, pair)) for pair in both]
    pairs = [pair for pair, kept in zip(said, mask, strict=True) if kept]
    held = {prompt for (prompt, *_), kept in zip(said, mask, strict=True) if not kept}
    prompts = Counter(prompt for prompt, *_ in pairs)
    responses = Counter(side for _, *sides in pairs for side in sides)
    assert found.train.prompts == len(prompts)
    assert found.train.most_of_a_prompt == max(prompts.values())
    assert found.train.repeated == len(pairs) - len(set(pairs)) > 0
    assert found.train.contradictions == sum((p, b, a) in set(pairs) for p, a, b in set(pairs)) / 2 > 0
    assert found.train.responses == len(responses)
    assert found.train.shared_responses == sum(n for n in responses.values() if n > 1) / (2 * len(pairs))
    assert found.train.special_inside == sum({0, 1, 2} & set(side[:-1]) != set() for _, *s in pairs for side in s)
    assert found.leaks == sum(prompt in held for prompt, *_ in pairs)


def test_edges_hold_all_and_are_even():
    for most in range(300):
        edges, around = _edges(most), _edges_around_zero(most)
        for bins, low in ((edges, 0), (around, -most)):
            assert len(set(np.diff(bins))) == 1
            assert len(bins) - 1 <= BINS
            assert bins[0] <= low <= most < bins[-1]
        middle = len(around) // 2
        assert -around[middle - 1] == around[middle] - 1  # as far to the left of 0 as to the right


def test_pairs_of_one_prompt_count_as_what_they_tell():
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.7).astype(float)
    alone = share_in_groups(values, np.arange(200))
    assert alone.interval == pytest.approx(share(values.tolist()).interval, abs=5e-4)
    copies = share_in_groups(np.tile(values, 5), np.tile(np.arange(200), 5))
    assert copies.interval == pytest.approx(alone.interval, abs=1e-9)
    assert copies.n == 1000
    assert share_in_groups(np.ones(50), np.arange(50) // 10).interval == share([1.0] * 5).interval
    assert share_in_groups(np.array([1.0, 0.0]), np.zeros(2, int)).interval == share([0.5]).interval


def test_the_interval_covers_what_it_should():
    """Groups of 1 to 8 pairs with a rate each: 95 % intervals hold the overall rate about 95 times of 100."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        groups = np.repeat(np.arange(80), rng.integers(1, 9, 80))
        rates = rng.beta(2, 2, 80)[groups]
        low, high = share_in_groups((rng.random(len(groups)) < rates).astype(float), groups).interval or (0, 0)
        hits += low <= 0.5 <= high
    assert 0.92 < hits / 400 < 0.98


PLANTED = {"repeated": 3, "contradictions": 2, "identical": 4, "leaks": 5, "longer": 60}


def planted(folder: Path) -> tuple[Path, Path]:
    """Training and held-out files with so many of each fault, and 80 honest training pairs of which 60 prefer length."""
    train = [
        {
            "prompt": f"question {i}",
            "chosen": "so it is" + " and so on" * (i < 60),
            "rejected": "no it is" + " or not" * (i >= 60),
        }
        for i in range(80)
    ]
    wrong = [train[i] for i in range(PLANTED["repeated"])]
    wrong += [
        {"prompt": f"asked {i}", "chosen": f"{x} is", "rejected": f"{y} is"}
        for i in range(PLANTED["contradictions"])
        for x, y in (("it", "he"), ("he", "it"))
    ]
    wrong += [{"prompt": f"again {i}", "chosen": "same", "rejected": "same"} for i in range(PLANTED["identical"])]
    held_out = [{"prompt": f"held {i}", "chosen": "the film is", "rejected": "a film is"} for i in range(120)]
    wrong += [{**held_out[i], "chosen": f"other {i}"} for i in range(PLANTED["leaks"])]
    for name, rows in (("train", train + wrong), ("held", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "train.jsonl", folder / "held.jsonl"


def chosen(folder: Path, encoder: PairTokenizer, **settings) -> Splits:
    train, held_out = planted(folder)
    data = Data(path=str(train), validation_path=str(held_out), **settings)
    return data.choose(data.store(encoder, folder / "cache"))


def test_planted_faults_are_found_exactly(policy, tmp_path):
    encoder = PairTokenizer(policy.tokenizer, 512, 256)
    splits = chosen(tmp_path, encoder, contradictions=Contradictions.keep)
    found = quality_of(splits.train, splits.held_out, splits.counts, encoder)
    assert found.counts["dropped: duplicate"] == PLANTED["repeated"]
    assert found.counts["dropped: identical sides"] == PLANTED["identical"]
    assert found.counts["contradictions"] == found.train.contradictions == PLANTED["contradictions"]
    assert found.leaks_dropped == PLANTED["leaks"]
    assert (found.leaks, found.train.repeated) == (0, 0)
    assert found.train.pairs == 80 + 2 * PLANTED["contradictions"]
    assert any("2 contradictions" in line and "data.contradictions=drop" in line for line in data_warnings(found))
    dropped = chosen(tmp_path, encoder, contradictions=Contradictions.drop)
    without = quality_of(dropped.train, dropped.held_out, dropped.counts, encoder)
    assert without.train.contradictions == 0
    assert without.train.chosen_longer.value == PLANTED["longer"] / 80
    assert [line for line in data_warnings(without) if "contradiction" in line] == []
    assert any("length alone predicts 75 %" in line for line in data_warnings(without))


def test_prompts_that_are_one_when_cut_leak(policy, tmp_path):
    rows = [
        {"prompt": f"{i} " + "the film was good and so it was", "chosen": "yes", "rejected": "no"} for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder, data = PairTokenizer(policy.tokenizer, 512, 6), Data(path=str(tmp_path / "pairs.jsonl"))
    splits = data.choose(data.store(encoder, tmp_path / "cache"))
    found = quality_of(splits.train, splits.held_out, splits.counts, encoder)
    assert found.leaks == found.train.pairs
    assert any("is held out too" in line and "data.max_prompt_length=" in line for line in data_warnings(found))


def advice_on(encoder: PairTokenizer, train: PairTable, held_out: PairTable, counts=None) -> list[str]:
    return data_warnings(quality_of(train, held_out, counts or {}, encoder))


def honest(count: int, first: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Pairs of as many prompts, half of them of a longer chosen response."""
    sides = ([5, 6, END], [7, END])
    return [([0, 3, first + i], *(sides if i % 2 else sides[::-1])) for i in range(count)]


def test_nothing_is_said_of_honest_pairs(encoder):
    assert advice_on(encoder, table(*honest(200)), table(*honest(100, 200))) == []


@pytest.mark.parametrize(
    ("train", "held_out", "counts", "says", "types"),
    [
        (honest(200), honest(99, 200), {}, "only 99 held-out pairs (under 100)", "data.validation_fraction="),
        (
            [([0, 3, i], [5, 6, END], [7, END]) if i < 140 else pair for i, pair in enumerate(honest(200))],
            honest(100, 200),
            {},
            "length alone predicts 85 % of the training labels (over 65 %)",
            "loss=ipo_mean",
        ),
        (
            [([0, 3, i], [7, END], [5, 6, END]) if i < 140 else pair for i, pair in enumerate(honest(200))],
            honest(100, 200),
            {},
            "the shorter one",
            "loss=ipo_mean",
        ),
        (
            [([0, 3, i], [7] * 37, [5, 6, END]) if i < 50 else pair for i, pair in enumerate(honest(200))],
            honest(100, 200),
            {},
            "25 % of the chosen responses (over 20 %)",
            "data.max_length=80",
        ),
        (
            [([0] * 7 + [i], *pair[1:]) if i < 50 else pair for i, pair in enumerate(honest(200))],
            honest(100, 200),
            {},
            "25 % of the prompts (over 20 %)",
            "data.max_prompt_length=16 data.max_length=48",
        ),
        (
            [([0, 3, 3], *pair[1:]) if i < 120 else pair for i, pair in enumerate(honest(200))],
            honest(100, 200),
            {},
            "one prompt has 60 % of the training pairs",
            "more prompts",
        ),
        (
            [([0, 3, 0], [5, 0, END], [7, 8, END]), *honest(199, 1)],
            honest(100, 200),
            {},
            "1 response with special tokens",
            "bare text",
        ),
        (
            honest(200),
            honest(100, 200),
            {"rows": 400, "dropped: duplicate": 20, "dropped: unusable": 80},
            "25 % of the rows are dropped (over 20 %), most of them as 'unusable'",
            "look at the rows",
        ),
    ],
)
def test_advice_at_its_threshold(train, held_out, counts, says, types, encoder):
    lines = advice_on(encoder, table(*train), table(*held_out), counts)
    (line,) = [line for line in lines if says in line]
    assert types in line
    assert "\n" not in line


def test_labels_against_scores_are_told_unless_noise_made_them(encoder):
    train, held_out = table(*honest(200), scores=[-1.0] * 12 + [1.0] * 188), table(*honest(100, 200))
    assert any("6 % of the training pairs with scores" in line for line in advice_on(encoder, train, held_out))
    assert advice_on(encoder, train.flip(np.arange(200) < 1), held_out) == []


@pytest.mark.parametrize("count", [3, 29])
def test_so_few_pairs_show_nothing(count, encoder):
    """Chosen is longer in all of them: no more is said than how little they show."""
    few = [([0, 3, i], [5, 6, END], [7, END]) for i in range(count)]
    found = quality_of(table(*few), table(*honest(100, 200)), {}, encoder)
    assert found.train.chosen_longer.value == 1
    assert isinstance(found, Quality)
    low = 100 * (found.train.chosen_longer.interval or (0, 1))[0]
    (line,) = data_warnings(found)
    assert f"only {count} training pairs (under 30): too few to show anything" in line
    assert f"the longer one in anything from {low:.0f} to 100 % of the pairs" in line


def test_a_claim_about_length_comes_with_its_interval(encoder):
    longer = [([0, 3, i], [5, 6, END], [7, END]) for i in range(30)]
    (line,) = advice_on(encoder, table(*longer), table(*honest(100, 200)))
    assert "length alone predicts 100 % of the training labels (over 65 %), 89 to 100 % with 95 % confidence" in line


def test_faults_of_prompts_are_told_where_they_are_counted(encoder):
    train, held_out = table(*honest(200)), table(*honest(100, 200))
    for what, said in DESCRIPTIONS.items():
        assert advice_on(encoder, train, held_out, {"rows": 200, what: 7}) == [said.format(n=f"7 {what}")]
        assert advice_on(encoder, train, held_out, {"rows": 200, what: 0}) == []
