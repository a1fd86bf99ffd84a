"""Labels of two unordered responses: arenas' rows, ties, and what is no label; empty responses counted by that reason."""

from __future__ import annotations

import json

import pytest

from dpo_lab.data.encoding import encode_chunk
from dpo_lab.data.formats import Format, Shape
from dpo_lab.data.labels import Label, NoPair
from dpo_lab.data.rows import BadData, Chunk
from dpo_lab.data.tokenize import PairTokenizer
from tests.data.test_formats import ROW, bot, dialogue, user
from tests.data.test_tokenized_cache import LENIENT, store_of, written
from tests.support.templates import tokenizer_of

ARENA = {
    "question_id": "1",
    "winner": "model_b",
    "conversation_a": [user("Hi"), bot("What?")],
    "conversation_b": [user("Hi"), bot("Hello.")],
}


def test_an_arenas_row_is_recognised_and_its_winner_chosen():
    (pair,) = Shape().read(ARENA)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Hi")], [bot("Hello.")], [bot("What?")])
    (pair,) = Shape().read(ARENA | {"winner": "model_a"})
    assert (pair.chosen, pair.rejected) == ([bot("What?")], [bot("Hello.")])
    row = {"prompt": "Hi", "response_a": "What?", "response_b": "Hello.", "winner": "model_b"}
    (pair,) = Shape().read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "Hello.", "What?")
    (same,) = Shape(format=Format.arena, columns={"prompt": "q", "label": "vote"}).read(
        {"q": "Hi", "response_a": "What?", "response_b": "Hello.", "vote": "model_b"}
    )
    assert same.key == pair.key


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad", "Tie"])
def test_a_tie_of_an_arena_is_counted_whatever_else_its_row_holds(winner):
    for row in (ARENA, ARENA | {"conversation_a": []}):
        with pytest.raises(NoPair, match=r"^tie$"):
            Shape().read(row | {"winner": winner})


@pytest.mark.parametrize("label", [2, 2.0, "2", "tie", " tie "])
@pytest.mark.parametrize("label_is", Label)
def test_a_label_of_two_is_a_tie(label, label_is):
    with pytest.raises(NoPair, match=r"^tie$"):
        Shape(columns={"label": "mark"}, label_is=label_is).read(ROW | {"mark": label})


@pytest.mark.parametrize("winner", ["model_c", None, 3, "", ["model_a"], float("nan"), -1, {"a": 1}])
def test_another_winner_is_a_bad_row(winner):
    with pytest.raises(ValueError, match="^field 'winner' is .*, not 0 or 1, model_a or model_b, nor a tie"):
        Shape().read(ARENA | {"winner": winner})


def test_ties_are_dropped_by_that_reason_and_no_bad_rows(tmp_path):
    """As the rows of Auto-J's test set, whose labels are 0, 1 and 2 for a tie."""
    rows = [{"prompt": "p", "response 1": f"a{i}", "response 2": f"b{i}", "label": i % 3} for i in range(9)]
    columns = {"prompt": "prompt", "chosen": "response 1", "rejected": "response 2", "label": "label"}
    shape = Shape(columns=columns, label_is=Label.index)
    store = store_of(tmp_path / "cache", written(tmp_path / "x.jsonl", *rows), shape=shape)
    assert (len(store.table), store.counts["dropped: tie"], store.counts["dropped: bad row"]) == (6, 3, 0)


def test_an_empty_response_is_its_own_reason_where_bad_rows_are_skipped(tmp_path):
    rows = [{"chosen": dialogue("Hi", f"{i}."), "rejected": dialogue("Hi", "No.")} for i in range(7)]
    empty = {"chosen": dialogue("Hi", "Yes."), "rejected": dialogue("Hi", "")}
    path = written(tmp_path / "x.jsonl", *rows, empty, {"chosen": 3})
    with pytest.raises(BadData, match=r"x.jsonl:8: field 'rejected' is empty after the last '\\n\\nAssistant:'; fix"):
        store_of(tmp_path / "cache", path)
    store = store_of(tmp_path / "cache", path, bad=LENIENT)
    assert (store.counts["dropped: empty response"], store.counts["dropped: bad row"]) == (1, 1)
    assert len(store.table) == 7


@pytest.mark.parametrize(
    "row",
    [
        ROW | {"chosen": " "},
        ROW | {"rejected": [bot("")]},
        {"prompt": "p", "responses": ["a", ""], "ratings": [1, 2]},
    ],
)
def test_every_format_counts_empty_responses(row):
    chunk = Chunk("x.jsonl", [1], [json.dumps(row).encode()], 1)
    (bad,) = encode_chunk(chunk, Shape(), PairTokenizer(tokenizer_of("plain"), 16, 8)).bad
    assert (bad[0], bad[2]) == (1, "dropped: empty response")
    assert "empty" in bad[1]
