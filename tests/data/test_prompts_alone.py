"""Rows of a prompt alone: what is read, tokenized and counted, and who leaves them out."""

from __future__ import annotations

from collections import Counter

import pytest

from dpo_lab.config.schema import ConfigError
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.formats import Shape
from dpo_lab.data.quality import quality_of
from dpo_lab.data.sources import Data
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.warnings import data_warnings
from dpo_lab.pipelines.row_checks import check_pairs, check_responses
from tests.data.test_formats import bot, said_by, system, user
from tests.data.test_tokenized_cache import store_of, written
from tests.support.configs import settled
from tests.support.templates import tokenizer_of

PAIR = {"prompt": "why", "chosen": "good", "rejected": "bad"}
ALONE = [{"prompt": f"question {i}"} for i in range(40)]


@pytest.mark.parametrize(
    ("row", "settings", "prompt"),
    [
        ({"prompt": "p"}, {}, "p"),
        ({"prompt": [user("Hi")]}, {}, [user("Hi")]),
        ({"prompt": "p"}, {"as_chat": True}, [user("p")]),
        ({"prompt": [user("Hi")], "system": "s"}, {}, [system("s"), user("Hi")]),
        ({"q": "p", "answer": "42"}, {"format": "prompt", "columns": {"prompt": "q"}}, "p"),
    ],
)
def test_a_row_of_a_prompt(row, settings, prompt):
    nothing = "" if isinstance(prompt, str) else []
    assert said_by(row, **settings) == [(prompt, nothing, nothing)]


def test_a_row_with_other_columns_is_no_prompt_alone():
    """A response under another name is not lost silently."""
    with pytest.raises(ValueError, match="field 'chosen' is missing"):
        Shape().read({"prompt": "p", "answer": "a"})


@pytest.mark.parametrize("family", ["plain", "chatml"])
def test_its_ids_are_those_of_the_prompt_of_a_pair(family):
    encoder = PairTokenizer(tokenizer_of(family), 400, 200)
    prompts = ["a b"] if family == "plain" else [[user("Hi"), bot("yes"), user("why")]]
    sides = ("c", "d") if family == "plain" else ([bot("c")], [bot("d")])
    for prompt in prompts:
        (alone,) = encoder.pairs(Shape().read({"prompt": prompt}), Counter())
        (pair,) = encoder.pairs(Shape().read({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}), Counter())
        assert list(alone.prompt) == list(pair.prompt)
        assert len(alone.chosen) == len(alone.rejected) == 0


def splits_of(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "rows.jsonl", *rows)
    return Data(path=str(file)).choose(store_of(tmp_path / "cache", file))


def checked(splits, *overrides: str):
    return check_pairs(settled("data=jsonl", "data.path=rows.jsonl", *overrides), splits)


def test_methods_that_sample_take_them_and_others_say_what_to_type(tmp_path, monkeypatch):
    splits = splits_of([PAIR, *ALONE], tmp_path, monkeypatch)
    assert len(splits.train) + len(splits.held_out) == 41
    assert not splits.unpaired
    assert checked(splits, "method=rloo") is splits
    with pytest.raises(ConfigError, match=r"rows.jsonl:2 is a prompt alone, and method=dpo trains on pairs .*; type"):
        checked(splits)
    with pytest.raises(ConfigError, match=r"rows.jsonl:2 is a prompt alone, and supervised .*; type"):
        check_responses(splits)


def test_they_are_left_out_where_bad_rows_are_skipped_unless_nothing_is_left(tmp_path, monkeypatch):
    pairs = [PAIR | {"prompt": f"why {i}"} for i in range(30)]
    kept = checked(splits_of([*pairs, *ALONE], tmp_path, monkeypatch), "data.on_bad_row=skip")
    assert len(kept.train) + len(kept.held_out) == 30
    assert kept.counts["dropped: prompt alone"] == 40
    alone = splits_of(ALONE, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="is a prompt alone"):
        checked(alone, "data.on_bad_row=skip")


def test_their_quality_is_that_of_prompts():
    encoder = PairTokenizer(tokenizer_of("plain"), 400, 200)
    table = PairTable.of(encoder.pairs([pair for row in ALONE for pair in Shape().read(row)], Counter()))
    quality = quality_of(table, table[:5], {}, encoder)
    assert quality.train.prompts == 40
    assert quality.train.responses == 0
    assert quality.train.unpaired == (0, 0)
    assert quality.train.chosen_longer is None
    told = " ".join(data_warnings(quality))
    assert "label" not in told
    assert "accuracy" not in told
    assert len(table.with_responses()) == 0
