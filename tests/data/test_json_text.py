"""Messages stored as JSON text are read as messages; a plain text that only looks like JSON is left alone, and counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dpo_lab.data.formats import Shape
from dpo_lab.data.json_text import chat_of
from dpo_lab.data.row_faults import JSON_LEFT, JSON_READ

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "good"), ("assistant", "bad"))
)
TOOL = {"type": "function", "function": {"name": "find"}}


def read(row: dict, **settings):
    counts: Counter[str] = Counter()
    (pair,) = Shape(**settings).read(row, counts)
    return pair, (counts[JSON_READ], counts[JSON_LEFT])


def as_text(*messages: dict) -> str:
    return json.dumps(messages)


EXPECTED = Shape().read({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": as_text(USER), "chosen": as_text(GOOD), "rejected": as_text(BAD)},
        {"chosen": as_text(USER, GOOD), "rejected": as_text(USER, BAD)},
        {"prompt": "Hi", "chosen": as_text(USER, GOOD), "rejected": as_text(USER, BAD)},
        {"prompt": [USER], "chosen": json.dumps(GOOD, indent=1), "rejected": json.dumps(BAD)},
        {"prompt": as_text(USER), "chosen": "good", "rejected": "bad"},
        {"chosen": json.dumps({"messages": [USER, GOOD]}), "rejected": json.dumps({"messages": [USER, BAD]})},
        {"prompt": str([USER]), "chosen": str([GOOD]), "rejected": str([BAD])},  # as pandas writes it into CSV
        {
            "prompt": json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}),
            "chosen": json.dumps({"from": "gpt", "value": "good"}),
            "rejected": json.dumps({"from": "gpt", "value": "bad"}),
        },
    ],
)
def test_messages_as_json_text_are_messages(row):
    pair, counted = read(row)
    assert pair == EXPECTED or (pair.key == EXPECTED.key)
    assert counted == (1, 0)


def test_columns_with_other_names_and_tools_in_the_text():
    row = {name: json.dumps({"messages": [USER, side], "tools": [TOOL]}) for name, side in (("a", GOOD), ("b", BAD))}
    pair, counted = read(row, columns={"chosen": "a", "rejected": "b"})
    assert (pair.prompt, pair.chosen, pair.tools) == ([USER], [GOOD], [TOOL])
    assert counted == (1, 0)
    own = {**TOOL, "function": {"name": "add"}}
    pair, _ = read(row | {"tools": [own]}, columns={"chosen": "a", "rejected": "b"})
    assert pair.tools == [own]


@pytest.mark.parametrize(
    ("row", "left"),
    [
        # an answer in JSON to a question in words
        ({"prompt": "Write a message.", "chosen": as_text(GOOD), "rejected": as_text(BAD)}, 1),
        ({"prompt": "Write one.", "chosen": as_text(USER, GOOD), "rejected": "no"}, 1),
        ({"prompt": "Give JSON.", "chosen": '{"value": 3}', "rejected": '{"value": 4}'}, 0),
        ({"prompt": "Give JSON.", "chosen": '[{"name": "a"}]', "rejected": "[1, 2]"}, 0),
        ({"prompt": f"{as_text(USER)} What is this?", "chosen": "a list", "rejected": "a dog"}, 1),
        ({"prompt": '[{"role": "user", "content": "Hi"', "chosen": "cut", "rejected": "short"}, 1),
        ({"prompt": '[{"role": "wizard", "content": "Hi"}]', "chosen": "a", "rejected": "b"}, 1),
    ],
)
def test_plain_text_that_looks_like_it_stays_plain_text(row, left):
    pair, counted = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(row.values())
    assert counted == (0, left)


def test_a_text_that_is_nested_too_deeply_is_no_chat():
    assert chat_of('[{"role": ' + "[" * 100_000) is None
