"""Rows of one labelled response: what is read, refused, tokenized, counted, and how pairs become such rows."""

from __future__ import annotations

import json
import math
import re
import shlex

import numpy as np
import pytest

from dpo_lab.core.noise import NOISES, Symmetric
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data.formats import Format, Shape
from dpo_lab.data.labels import NoPair
from dpo_lab.data.quality import quality_of
from dpo_lab.data.rows import BadData
from dpo_lab.data.sources import Contradictions, Data
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.warnings import data_warnings
from tests.conftest import REPOSITORY, make_pairs
from tests.data.test_formats import bot, said, said_by, system, user
from tests.data.test_tokenized_cache import LENIENT, contents, store_of, written
from tests.support.configs import settled
from tests.support.templates import ids_of, tokenizer_of

ROW = {"prompt": "p", "completion": "good", "label": True}


@pytest.mark.parametrize("label", [True, 1, 1.0, "1", "true", "True"])
def test_a_desirable_response_is_chosen(label):
    assert said_by(ROW | {"label": label}) == [("p", "good", "")]


@pytest.mark.parametrize("label", [False, 0, 0.0, "0", "false", "FALSE"])
def test_an_undesirable_response_is_rejected(label):
    assert said_by(ROW | {"label": label}) == [("p", "", "good")]


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"prompt": [user("Hi")], "completion": [bot("a")]}, {}, ([user("Hi")], [bot("a")], [])),
        ({"prompt": "Hi", "completion": [user("Hi"), bot("a")]}, {}, ([user("Hi")], [bot("a")], [])),
        ({"completion": [system("s"), user("Hi"), bot("a")]}, {}, ([system("s"), user("Hi")], [bot("a")], [])),
        ({"prompt": "Hi", "completion": "a"}, {"as_chat": True}, ([user("Hi")], [bot("a")], [])),
        ({"prompt": [user("Hi")], "completion": [bot("a"), said("tool", "b"), bot("c")]}, {},
         ([user("Hi")], [bot("a"), said("tool", "b"), bot("c")], [])),
        ({"prompt": "", "completion": "a"}, {}, ("", "a", "")),
        ({"prompt": json.dumps([user("Hi")]), "completion": json.dumps([bot("a")])}, {}, ([user("Hi")], [bot("a")], [])),
        ({"q": "Hi", "text": "a", "thumb": 1}, {"columns": {"prompt": "q", "completion": "text", "label": "thumb"}},
         ("Hi", "a", "")),
        ({"q": "Hi", "completion": "a"}, {"format": "unpaired", "columns": {"prompt": "q"}}, ("Hi", "a", "")),
    ],
)  # fmt: skip
def test_prompt_and_completion(row, settings, expected):
    assert said_by({"label": True} | row, **settings) == [expected]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p", "completion": "good"}, "field 'label' is missing (the row has 'prompt', 'completion')"),
        (ROW | {"label": 3}, "field 'label' is 3, not true or false, 1 or 0"),
        (ROW | {"label": None}, "field 'label' is None, not true or false"),
        (ROW | {"label": "tie"}, "field 'label' is 'tie', not true or false"),
        (ROW | {"label": math.nan}, "field 'label' is nan, not true or false"),
        (ROW | {"label": [1]}, "field 'label' is [1], not true or false"),
        (ROW | {"completion": 3}, "field 'completion' is int, not a string or a list of messages"),
        (ROW | {"completion": None}, "field 'completion' is NoneType, not a string"),
        (ROW | {"completion": " "}, "field 'completion' is empty"),
        (ROW | {"completion": []}, "field 'completion' is empty"),
        (ROW | {"prompt": [user("Hi")], "completion": [bot("")]}, "field 'completion' is empty"),
        (
            ROW | {"completion": [bot("a"), user("b")]},
            "field 'completion' holds 2 messages after the prompt (roles assistant, user)",
        ),
        (ROW | {"completion": "a\0"}, "field 'completion' has a NUL character at position 1"),
        ({"completion": "a", "label": 1}, "field 'prompt' is missing (the row has 'completion', 'label')"),
        ({"completion": [bot("a")], "label": 1}, "field 'prompt' is missing, or empty"),
    ],
)
def test_bad_rows_are_named_by_field(row, what):
    with pytest.raises(ValueError, match="^field '") as error:
        Shape().read(row)
    assert what in str(error.value)


def test_a_row_of_two_empty_sides_is_no_pair_and_no_response():
    with pytest.raises(ValueError, match="^field 'chosen' is empty"):
        Shape().read({"prompt": "p", "chosen": "", "rejected": ""})


def test_both_labels_of_a_response_have_other_keys_and_one_split():
    (good,), (bad,) = Shape().read(ROW), Shape().read(ROW | {"label": False})
    assert good.key != bad.key
    assert good.decides_split == bad.decides_split == "p"
    alone = [Shape().read(ROW | {"prompt": "", "label": label})[0].decides_split for label in (0, 1)]
    assert alone == ["good", "good"]
    assert Pair("", "a", "b").decides_split == ""


def test_pairs_of_one_question_are_in_one_split_whatever_their_answers_share():
    """First messages that both sides share are part of the prompt, but do not decide the split."""
    called = {
        "prompt": [user("Hi")],
        "chosen": [bot("a"), said("tool", "b"), bot("c")],
        "rejected": [bot("a"), said("tool", "b"), bot("d")],
    }
    (one,), (other,) = (
        Shape().read(called),
        Shape().read({"prompt": "Hi", "chosen": [bot("a")], "rejected": [bot("b")]}),
    )
    assert one.prompt == [user("Hi"), bot("a"), said("tool", "b")]
    assert one.decides_split == other.decides_split == [user("Hi")]


def test_the_side_that_there_is_not_has_no_tokens(tmp_path):
    rows = [ROW, ROW | {"completion": "bad", "label": False}, {"prompt": "q", "chosen": " a", "rejected": " b"}]
    store = store_of(tmp_path / "cache", written(tmp_path / "x.jsonl", *rows))
    good, bad = (ids_of("plain", f"{text}<|end|>") for text in ("good", "bad"))
    found = [(chosen, rejected) for _, _, chosen, rejected, _ in contents(store)]
    assert found[0] == (good, [])
    assert found[1] == ([], bad)
    assert store.table.is_one_sided.tolist() == [True, True, False]


@pytest.mark.parametrize("family", ["llama3", "chatml"])
@pytest.mark.parametrize("label", [True, False])
def test_a_chat_has_the_tokens_that_it_has_in_a_pair(family, label, tmp_path):
    chat = {"prompt": [user("Hi")], "completion": [bot("yes")], "label": label}
    pair = {"prompt": [user("Hi")], "chosen": [bot("yes")], "rejected": [bot("no")]}
    one, two = (
        store_of(tmp_path / "cache", written(tmp_path / f"{i}.jsonl", row), family=family)
        for i, row in enumerate((chat, pair))
    )
    single, whole = one.table[0], two.table[0]
    assert list(single.prompt) == list(whole.prompt)
    assert list(single.chosen if label else single.rejected) == list(whole.chosen)
    assert not len(single.rejected if label else single.chosen)


def test_opposite_labels_of_a_response_contradict_each_other(tmp_path):
    rows = [ROW | {"prompt": f"p{i}"} for i in range(20)]
    path = written(tmp_path / "x.jsonl", *rows, rows[3] | {"label": False}, rows[4])
    store = store_of(tmp_path / "cache", path)
    assert store.counts["dropped: duplicate"] == 1
    with pytest.raises(BadData, match=r"x.jsonl:4 and .*x.jsonl:21 contradict each other"):
        Data(path=str(path)).choose(store)
    splits = Data(path=str(path), contradictions=Contradictions.drop, validation_fraction=0.3).choose(store)
    assert len(splits.train) + len(splits.held_out) == 19
    assert splits.unpaired == f"{path}:1 is one response with a label"


def test_empty_completions_are_counted_by_that_reason(tmp_path):
    path = written(tmp_path / "x.jsonl", ROW, ROW | {"completion": ""}, ROW | {"label": 3}, ROW | {"prompt": "q"})
    store = store_of(tmp_path / "cache", path, bad=LENIENT)
    assert (store.counts["dropped: empty response"], store.counts["dropped: bad row"], len(store.table)) == (1, 1, 2)


def test_a_table_of_pairs_becomes_one_of_responses():
    pairs = [*make_pairs(6), EncodedPair("single", [1, 2], [], [3, 4, 5], flipped=False)]
    table = PairTable.of(pairs)
    rows = table.unpair()
    assert len(rows) == 13
    for i, pair in enumerate(pairs[:6]):
        desirable, undesirable = rows[2 * i], rows[2 * i + 1]
        assert [list(part) for part in (desirable.prompt, desirable.chosen, desirable.rejected)] == [
            list(pair.prompt), list(pair.chosen), []]  # fmt: skip
        assert [list(part) for part in (undesirable.prompt, undesirable.chosen, undesirable.rejected)] == [
            list(pair.prompt), [], list(pair.rejected)]  # fmt: skip
    assert (rows.key(12), list(rows[12].rejected)) == ("single", [3, 4, 5])
    assert len(set(rows.keys.tolist())) == 13
    assert np.isnan(rows.gold_margin).all()
    part = table.select(np.array([4, 1])).unpair()
    assert part.keys.tolist() == [rows.keys[i] for i in (8, 9, 2, 3)]  # a key depends on pair and side alone
    assert rows.unpair().digest() == rows.digest()


def test_noise_flips_labels_by_key():
    rows = PairTable.of(make_pairs(300)).unpair()
    flips = Symmetric(rate=0.3).flips(rows)
    assert 0.24 < flips.mean() < 0.36
    assert flips[::2].tolist() != flips[1::2].tolist()  # of each row, not of each pair
    flipped = rows.flip(flips)
    assert [len(row.chosen) > 0 for row in flipped] == [(i % 2 == 0) != flip for i, flip in enumerate(flips)]
    for name in ("uncertainty", "one_sided"):
        with pytest.raises(
            ValueError, match="compares the two responses of a pair, and 600 of 600 training rows have one"
        ):
            NOISES[name]().flips(rows)


def quality(rows: list[EncodedPair]):
    table = PairTable.of(rows)
    return quality_of(
        table, table.select(slice(0, 0)), {"rows": len(rows)}, PairTokenizer(tokenizer_of("plain"), 64, 32)
    )


def test_the_quality_of_rows_counts_no_side_that_there_is_not():
    end = PairTokenizer(tokenizer_of("plain"), 64, 32).eos_id
    rows = [EncodedPair(f"{i}", [i], [5] * i + [end], []) for i in range(1, 5)]
    rows += [EncodedPair("x", [9], [], [6, 6, 6]), EncodedPair("y", [10], [7, 7, end], [8, end])]
    found = quality(rows)
    assert found.train.unpaired == (4, 1)
    assert (found.train.lengths["chosen"].mean, found.train.lengths["rejected"].mean) == ((2 + 3 + 4 + 5 + 3) / 5, 2.5)
    assert (found.train.lengths["chosen"].truncated, found.train.lengths["rejected"].truncated) == (0, 0.5)
    assert (found.train.chosen_longer.value, found.train.difference) == (1, 1)
    assert sum(found.train.lengths["chosen"].histogram) == 5
    assert found.train.responses == 7
    assert found.noise.flipped["desirable"] == [4, 0]


def test_rows_of_one_label_are_warned_of():
    end = PairTokenizer(tokenizer_of("plain"), 64, 32).eos_id
    found = quality([EncodedPair(f"{i}", [i], [5, end], []) for i in range(1, 41)])
    assert found.train.chosen_longer is None
    assert found.train.lengths["rejected"].mean == 0
    (line,) = [line for line in data_warnings(found) if "desirable" in line]
    assert line.startswith("all training rows are desirable ones")


def test_recognised_by_its_columns():
    assert Shape()._recognise(ROW) is Format.unpaired
    assert Shape()._recognise(ROW | {"chosen": "a", "rejected": "b"}) is Format.preference


def test_the_examples_of_the_documentation():
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"```json\n(.*?)```", text, re.S) if "winner" in each]
    arena, tie, good, bad = map(json.loads, block.splitlines())
    assert said_by(arena) == [([user("Hi")], [bot("Hello.")], [bot("What?")])]
    with pytest.raises(NoPair, match="tie"):
        Shape().read(tie)
    assert said_by(good) == [("The sky is", " blue.", "")]
    assert said_by(bad) == [([user("Hi")], [], [bot("What?")])]
    lines = [line for line in text.splitlines() if "loss=bco" in line or "loss=kto" in line]
    commands = [line.rsplit("  ", 1)[0] if "  " in line else line for line in lines]
    commands = [line for line in commands if line.startswith("data.path=")]
    assert len(commands) == 3
    for command in commands:
        assert settled(*shlex.split(command)).loss.takes_unpaired
