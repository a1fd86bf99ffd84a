"""Rows of every shape to pairs: what is prompt and what is answer, ratings and labels, bad rows named by field."""

from __future__ import annotations

import json
import math

import pytest
from omegaconf import OmegaConf

from dpo_lab.core.pairs import Pair
from dpo_lab.data.formats import Format, Label, NoPair, Pick, Shape, shared_words
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures" / "formats"
ROW = {"prompt": "p", "chosen": "good", "rejected": "bad"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def system(content: str) -> dict[str, str]:
    return said("system", content)


def user(content: str) -> dict[str, str]:
    return said("user", content)


def bot(content: str) -> dict[str, str]:
    return said("assistant", content)


def shape(**settings) -> Shape:
    """As a config makes it: enums and all from plain YAML values."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Shape), settings))  # type: ignore[return-value]


def said_by(row: dict, **settings) -> list[tuple]:
    """What the pairs of a row say, tools and scores aside."""
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in shape(**settings).read(row)]


def summary(pair: Pair) -> tuple:
    margin = None if math.isnan(pair.score_margin) else pair.score_margin
    return pair.prompt, pair.chosen, pair.rejected, margin


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


PRESETS = {
    "hh_rlhf": [
        ("\n\nHuman: How do I whistle?\n\nAssistant:", " Purse your lips and blow.", " No idea.", None),
        (
            "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a river.\n\nIn Asia.\n\nAssistant:",
            " The Mekong.",
            " The Danube.",
            None,
        ),
        ("\n\nHuman: Is ice heavier than water?\n\nAssistant:", " No:\n\nit floats.", " Yes.", None),
    ],
    "ultrafeedback_binarized": [
        ([user("Name a prime.")], [bot("Seven.")], [bot("Nine.")], 6.5),
        ([user("Translate 'chat' into English.")], [bot("It means cat.")], [bot("It means to talk.")], 0.0),
        ([user("Write a haiku\nabout rain.")], [bot("Grey sky, soft drumming")], [bot("Rain is wet.")], -0.5),
    ],
    "tldr": [
        (
            "SUBREDDIT: r/bikes\n\nTITLE: Chain fell off\n\nPOST: It fell off twice.\nI fixed it.\n\nTL;DR:",
            " Chain fell off, fixed it.",
            " A bike.",
            None,
        ),
        (
            "SUBREDDIT: r/tea\n\nTITLE: Too bitter\n\nPOST: I steep it for an hour.\n\nTL;DR:",
            " Oversteeped tea is bitter.",
            " I drink tea.",
            None,
        ),
        (
            "SUBREDDIT: r/pets\n\nTITLE: Loud parrot\n\nPOST: He wakes me at five.\n\nTL;DR:",
            " Parrot wakes me early.",
            " Parrots live long.",
            None,
        ),
    ],
    "shp": [
        ([user("Why did my bread not rise?")], [bot("The yeast was dead.")], [bot("Buy bread.")], 32.0),
        ([user("Can I freeze dough?")], [bot("Yes, after the first rise.")], [bot("No.")], 15.0),
        ([user("Butter or oil?")], [bot("Oil, if it should stay moist.")], [bot("Butter tastes better.")], 3.0),
    ],
    "orca_dpo_pairs": [
        ([user("What is 2 + 2?")], [bot("4")], [bot(" Sure! It is 5.")], None),
        ([system("You are a helpful assistant."), user("Name a fish.")], [bot("A carp.")], [bot("A whale.")], None),
        ([system("Answer in French."), user("Good morning?")], [bot("Bonjour !")], [bot("Good morning!")], None),
    ],
}
OTHERS = {
    "text": [
        ("The plot", " was good.", " was dull.", None),
        ("", "A start.", "Start.", None),
        ("Größe: ", "🙂", "klein", None),
    ],
    "implicit_text": [
        ("The sky is", " blue.", " blurred.", None),
        ("Q: why?", "\nA: because", "\n\nA: no", None),
    ],
    "chat": [
        ([system("Be brief."), user("Hi")], [bot("Hello.")], [bot("What?")], None),
        ([user("One?"), bot("Two."), user("Three?")], [bot("Four.")], [bot("Five.")], 4.0),
    ],
    "implicit_chat": [
        ([user("Hi")], [bot("Hello.")], [bot("What?")], None),
        ([system("Be brief."), user("Hi"), bot("Yes?"), user("Bye")], [bot("Bye.")], [bot("Why?")], None),
    ],
    "sharegpt": [
        ([system("Be brief."), user("Hi")], [bot("Hello.")], [bot("What?")], None),
        ([user("One?")], [bot("Two.")], [bot("Six.")], None),
    ],
    "tools": [
        (
            [user("2 + 3?"), CALL, {"role": "tool", "name": "add", "content": "5"}],
            [bot("It is 5.")],
            [bot("It is 6.")],
            None,
        ),
        ([user("2 + 3?")], [CALL], [bot("About 6.")], None),
    ],
    "ratings": [
        ("Name a fish.", "A carp.", "A whale.", 4.0),
        ("Name a bird.", "A wren.", "A bat.", 2.5),
    ],
    "rated_objects": [("Name a fish.", "A carp.", "A whale.", 6.5)],
    "summarize_from_feedback": [
        ("It fell off twice.", " Chain fell off.", " A bike.", None),
        ("I steep it for an hour.", " Oversteeped.", " Tea.", None),
    ],
}
SETTINGS = {
    "rated_objects": {"columns": {"prompt": "instruction", "responses": "completions"}},
    "summarize_from_feedback": {
        "columns": {
            "prompt": "info.post",
            "chosen": "summaries.0.text",
            "rejected": "summaries.1.text",
            "label": "choice",
        },
        "label_is": "index",
    },
}


def read(name: str, settings: dict) -> list[Pair]:
    lines = (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [pair for line in lines for pair in shape(**settings).read(json.loads(line))]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_rows_of_their_source(name):
    preset = OmegaConf.load(REPOSITORY / "conf" / "data" / f"{name}.yaml")
    settings = {key: preset[key] for key in Shape.__dataclass_fields__ if key in preset}
    assert [summary(pair) for pair in read(name, settings)] == PRESETS[name]
    assert {"path", "split", "max_length", "max_prompt_length", "batch_size"} <= set(preset)


@pytest.mark.parametrize("name", OTHERS)
def test_every_format_reads(name):
    assert [summary(pair) for pair in read(name, SETTINGS.get(name, {}))] == OTHERS[name]


def test_tools_come_as_objects_or_json():
    assert [pair.tools for pair in read("tools", {})] == [[TOOL], [TOOL]]


def test_every_fixture_is_expected_here():
    assert {path.stem for path in FIXTURES.glob("*.jsonl")} == PRESETS.keys() | OTHERS.keys()


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("Hi", [bot("a")], [bot("b")], [user("Hi")]),
        ([user("Hi")], "a", "b", [user("Hi")]),
        (user("Hi"), bot("a"), bot("b"), [user("Hi")]),
        ("Hi", [user("Hi"), bot("a")], [user("Hi"), bot("b")], [user("Hi")]),
        ("Hi\n", [user("Hi"), bot("a")], [user("Hi"), bot("b")], [user("Hi")]),
        ("Hi", [system("s"), user("Hi"), bot("a")], [system("s"), user("Hi"), bot("b")], [system("s"), user("Hi")]),
        ("Bye", *([user("Hi"), bot("x"), user("Bye"), bot(a)] for a in "ab"), [user("Hi"), bot("x"), user("Bye")]),
        ("Hi", *([user("Hi"), bot("x"), user("Bye"), bot(a)] for a in "ab"), [user("Hi"), bot("x"), user("Bye")]),
        ([system("s"), user("Hi")], *([user("Hi"), bot(a)] for a in "ab"), [system("s"), user("Hi")]),
        ("Hi", *([bot("x"), user("Bye"), bot(a)] for a in "ab"), [user("Hi"), bot("x"), user("Bye")]),
        ("Go on", *([bot("x"), user("Go on"), bot(a)] for a in "ab"), [user("Go on"), bot("x"), user("Go on")]),
        ("Hi", *([user("Hi"), CALL, said("tool", "5"), bot(a)] for a in "ab"), [user("Hi"), CALL, said("tool", "5")]),
    ],
)
def test_messages_that_both_sides_begin_with_belong_to_the_prompt_once(prompt, chosen, rejected, expected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert said_by(row) == [(expected, [bot("a")], [bot("b")])]


@pytest.mark.parametrize(
    ("a", "b", "cut"),
    [
        ("one two three", "one two four", len("one two")),
        ("one two", "one twofold", len("one")),
        ("one two", "one two three", len("one")),
        ("one two \n", "one two three", len("one")),
        ("one\ntwo", "one two", len("one")),
        ("one  two", "one \ntwo", len("one")),
        ("cat", "car", 0),
        ("one two", "onerous", 0),
        (" one", " two", 0),
        ("one two", "one two", len("one")),
    ],
)
def test_a_prompt_left_unsaid_ends_with_a_whole_word(a, b, cut):
    assert shared_words(a, b) == shared_words(b, a) == cut


def test_plain_strings_become_messages_on_demand():
    assert said_by(ROW, as_chat=True) == [([user("p")], [bot("good")], [bot("bad")])]
    assert said_by(ROW | {"system": "s"}, as_chat=True) == [([system("s"), user("p")], [bot("good")], [bot("bad")])]
    sides = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
    assert said_by(sides, as_chat=True) == [([user("The sky is")], [bot("blue.")], [bot("red.")])]
    rated = {"prompt": "p", "responses": ["bad", "good"], "ratings": [1, 2]}
    assert said_by(rated, as_chat=True) == [([user("p")], [bot("good")], [bot("bad")])]
    row = {"chosen": dialogue("Hi", "Yes?", "Bye", "Good bye. "), "rejected": dialogue("Hi", "Yes?", "Bye", "No.")}
    prompt = [user("Hi"), bot("Yes?"), user("Bye")]
    assert said_by(row, as_chat=True) == [(prompt, [bot("Good bye.")], [bot("No.")])]


def test_a_prompt_with_a_system_message_keeps_its_own():
    row = {"prompt": [system("own"), user("p")], "chosen": "good", "rejected": "bad", "system": "row's"}
    assert said_by(row) == [([system("own"), user("p")], [bot("good")], [bot("bad")])]


def test_parts_of_text_are_joined():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]}
    assert said_by(ROW | {"prompt": [parts]}) == [([user("ab")], [bot("good")], [bot("bad")])]


def test_keys_of_a_message_are_kept_unless_none():
    prompt = [{"role": "user", "content": "p", "name": "Ann", "weight": 0, "tool_calls": None}]
    kept = {"role": "user", "content": "p", "name": "Ann", "weight": 0}
    assert said_by(ROW | {"prompt": prompt}) == [([kept], [bot("good")], [bot("bad")])]


RATED = {"prompt": "p", "responses": ["b", "a", "c", "d", "e"], "ratings": [2, "5", None, 5.0, 1]}


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        (Pick.best_worst, [("a", "e", 4)]),
        (Pick.best_rest, [("a", "b", 3), ("a", "e", 4)]),
        (Pick.all, [("a", "b", 3), ("d", "b", 3), ("b", "e", 1), ("a", "e", 4), ("d", "e", 4)]),
    ],
)
def test_ratings_become_pairs_by_the_pick(pick, expected):
    pairs = Shape(pick=pick).read(RATED)
    assert [(p.prompt, p.chosen, p.rejected, p.score_margin) for p in pairs] == [("p", *pair) for pair in expected]


def test_a_nan_rating_leaves_its_response_out():
    row = RATED | {"ratings": [2, 1, math.nan, "nan", 0]}
    assert [(p.chosen, p.rejected) for p in Shape().read(row)] == [("b", "e")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"rejected": "good"}, "identical sides"),
        ({"chosen": "same", "rejected": "same"}, "identical sides"),
        ({"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "a")}, "identical sides"),
        ({"chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("a")]}, "identical sides"),
        (RATED | {"responses": ["x"] * 5}, "identical sides"),
        (RATED | {"ratings": [3, 3, 3, 3, 3]}, "tied ratings"),
        (RATED | {"ratings": [3, None, None, None, None]}, "fewer than two responses"),
        (RATED | {"responses": [], "ratings": []}, "fewer than two responses"),
    ],
)
def test_rows_without_a_preference_say_why(row, reason):
    with pytest.raises(NoPair) as error:
        Shape().read(row)
    assert str(error.value) == reason


def test_whitespace_alone_tells_no_chat_answers_of_a_transcript_apart():
    row = {"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "a ")}
    assert len(Shape().read(row)) == 1
    with pytest.raises(NoPair, match="identical sides"):
        Shape(as_chat=True).read(row)


@pytest.mark.parametrize(
    ("fields", "margin"),
    [
        ({"score_chosen": 5, "score_rejected": 2.5}, 2.5),
        ({"score_chosen": "1", "score_rejected": "3"}, -2.0),
        ({"chosen_score": 5, "rejected_score": 2}, 3.0),
        ({"chosen-rating": 5, "rejected-rating": 2}, 3.0),
        ({"chosen_rating": 5, "rejected_rating": 2}, 3.0),
        ({"score_chosen": 5, "score_rejected": None}, None),
        ({"score_chosen": 5}, None),
        ({}, None),
    ],
)
def test_scores_give_a_margin_and_never_swap(fields, margin):
    (pair,) = Shape().read(ROW | fields)
    assert summary(pair) == ("p", "good", "bad", margin)


@pytest.mark.parametrize(
    ("label_is", "label", "is_turned"),
    [
        (Label.first, 1, False),
        (Label.first, True, False),
        (Label.first, 0, True),
        (Label.first, False, True),
        (Label.index, 0, False),
        (Label.index, 1, True),
        (Label.index, "0", False),
        (Label.first, "0", True),
        (Label.first, "1", False),
    ],
)
def test_a_label_says_which_side_is_preferred(label_is, label, is_turned):
    row = ROW | {"score_chosen": 5, "score_rejected": 2, "mark": label}
    (pair,) = Shape(columns={"label": "mark"}, label_is=label_is).read(row)
    assert summary(pair) == (("p", "bad", "good", -3.0) if is_turned else ("p", "good", "bad", 3.0))
    assert pair.key == Pair("p", pair.chosen, pair.rejected).key


def test_a_label_that_no_column_names_is_left_alone():
    assert said_by(ROW | {"label": 0}) == [("p", "good", "bad")]


def test_formats_can_be_set_against_the_looks_of_a_row():
    row = {"chosen": dialogue("Hi", "one two"), "rejected": dialogue("Hi", "one three")}
    assert said_by(row) == [("\n\nHuman: Hi\n\nAssistant:", " one two", " one three")]
    assert said_by(row, format="preference") == [("\n\nHuman: Hi\n\nAssistant: one", " two", " three")]
    questions = ROW | {"chosen": dialogue("a?"), "rejected": dialogue("b?")}
    assert said_by(questions) == [("p", dialogue("a?"), dialogue("b?"))]
    both = ROW | RATED
    assert said_by(both) == [("p", "good", "bad")]
    assert said_by(both, format="ratings") == [("p", "a", "e")]


INFO = {"columns": {"prompt": "info.post"}}
WHOLE = {"format": "text", "columns": {"text": "body"}}
SUMMARY = {"columns": {"chosen": "summaries.2.text"}}
TWO = [user("Hi"), bot("a"), user("And?"), bot("b")]
BAD = [
    ({"prompt": "x", "chosen": "y"}, {}, "field 'rejected' is missing (the row has 'prompt', 'chosen')"),
    ({}, {}, "field 'chosen' is missing (the row has none)"),
    (ROW | {"prompt": None}, {}, "field 'prompt' is NoneType, not a string or a list of messages"),
    (ROW | {"chosen": None}, {}, "field 'chosen' is NoneType, not a string or a list of messages"),
    (ROW | {"rejected": 3}, {}, "field 'rejected' is int, not a string or a list of messages"),
    (ROW | {"chosen": "  "}, {}, "field 'chosen' is empty"),
    (ROW | {"chosen": []}, {}, "field 'chosen' is empty"),
    (ROW | {"chosen": [bot("  ")]}, {}, "field 'chosen' is empty"),
    (ROW | {"prompt": ["x"]}, {}, "field 'prompt' holds str where a message should be"),
    (ROW | {"prompt": []}, {"as_chat": True}, "field 'prompt' is missing, or empty"),
    ({"chosen": [bot("a")], "rejected": [bot("b")]}, {}, "field 'prompt' is missing, or empty"),
    ({"chosen": "cat", "rejected": "car"}, {}, "field 'prompt' is missing and both sides share no first word"),
    (ROW | {"prompt": [{"content": "x"}]}, {}, "field 'prompt' has a message without a role (it has 'content')"),
    (ROW | {"prompt": [{"from": "cat", "value": "x"}]}, {}, "field 'prompt' has a message from 'cat', not from one of"),
    (
        ROW | {"chosen": [{"role": "assistant", "content": None}]},
        {},
        "field 'chosen' has a message whose content is None",
    ),
    (ROW | {"chosen": [bot("") | {"tool_calls": []}]}, {}, "field 'chosen' is empty"),
    (
        ROW | {"prompt": [user("x") | {"content": [{"type": "image_url"}]}]},
        {},
        "has a content part of type 'image_url'",
    ),
    (ROW | {"prompt": [user("x") | {"content": ["x"]}]}, {}, "field 'prompt' has a content part of type 'str'"),
    (
        ROW | {"chosen": TWO},
        {},
        "field 'chosen' holds 4 messages after the prompt (roles user, assistant, user, assistant):"
        " a response must begin and end with the assistant",
    ),
    ({"chosen": TWO[:3], "rejected": TWO[:2]}, {}, "field 'chosen' holds 2 messages after the prompt"),
    (ROW | {"chosen": [user("x")]}, {}, "field 'chosen' holds 1 messages after the prompt (roles user)"),
    (ROW | {"prompt": "Where is the\0 cat?"}, {}, "field 'prompt' has a NUL character at position 12"),
    (ROW | {"chosen": "ab\ud800"}, {}, "field 'chosen' has a lone surrogate at position 2"),
    (ROW | {"rejected": [bot("\0")]}, {}, "field 'rejected' has a NUL character at position 0"),
    (ROW | {"system": "s\0"}, {"as_chat": True}, "field 'system' has a NUL character at position 1"),
    (RATED | {"responses": ["\udc00", *"acde"]}, {}, "field 'responses' has a lone surrogate at position 0"),
    (ROW | {"tools": '[{"name": "\\u0000"}]'}, {"as_chat": True}, "field 'tools' has a NUL character at position 0"),
    (ROW | {"tools": "[{"}, {"as_chat": True}, "field 'tools' is not JSON ("),
    (ROW | {"tools": ["x"]}, {"as_chat": True}, "field 'tools' is not a list of objects, or the JSON of one"),
    (ROW | {"tools": [TOOL]}, {}, "field 'tools' can't be used with plain text; type data.as_chat=true"),
    (ROW | {"system": "Be brief."}, {}, "field 'system' can't be used with plain text; type data.as_chat=true"),
    (ROW | {"system": 3}, {}, "field 'system' is int, not a string"),
    (ROW | {"score_chosen": "high"}, {}, "field 'score_chosen' has 'high' where a number should be"),
    (ROW | {"score_chosen": True}, {}, "field 'score_chosen' has True where a number should be"),
    (ROW | {"mark": 3}, {"columns": {"label": "mark"}}, "field 'mark' is 3, not 0 or 1"),
    (ROW | {"mark": None}, {"columns": {"label": "mark"}}, "field 'mark' is None, not 0 or 1"),
    (ROW | {"mark": "yes"}, {"columns": {"label": "mark"}}, "field 'mark' is 'yes', not 0 or 1"),
    (
        ROW,
        {"columns": {"prompt": "question"}},
        "field 'question' is missing (the row has 'prompt', 'chosen', 'rejected')",
    ),
    ({"body": 3}, WHOLE, "field 'body' is int, not a string"),
    ({"body": " "}, WHOLE, "field 'body' is empty"),
    ({"body": "a\0"}, WHOLE, "field 'body' has a NUL character at position 1"),
    (ROW, WHOLE, "field 'body' is missing (the row has 'prompt', 'chosen', 'rejected')"),
    (ROW, INFO, "field 'info' is missing (the row has 'prompt'"),
    (ROW | {"info": {"title": "t"}}, INFO, "field 'info.post' is missing ('info' has 'title')"),
    (ROW | {"info": None}, INFO, "field 'info.post' is missing ('info' is NoneType)"),
    (ROW | {"info": {"post": 3}}, INFO, "field 'info.post' is int, not a string"),
    (ROW | {"summaries": ["x", "y"]}, SUMMARY, "field 'summaries.2' is missing ('summaries' has 2 items)"),
    (
        ROW | {"summaries": ["x"]},
        {"columns": {"chosen": "summaries.first"}},
        "field 'summaries.first' is missing ('summaries' has 1 items)",
    ),
    (ROW, {"columns": {"system": "persona"}}, "field 'persona' is missing"),
    (ROW, {"format": "transcript"}, r"field 'chosen' is not a transcript: it must begin with '\n\nHuman:'"),
    (
        {"chosen": dialogue("Hi", "a", "And?", "b"), "rejected": dialogue("Hi", "a")},
        {},
        "field 'chosen' continues beyond one answer (after the turns of both sides: Assistant, Human, Assistant)",
    ),
    (
        {"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "b", "?")},
        {},
        "'rejected' continues beyond one answer",
    ),
    ({"chosen": dialogue("Hi", "a", "b"), "rejected": dialogue("Hi", "a", "c")}, {}, "both sides: Human)"),
    ({"chosen": dialogue("Hi", "a"), "rejected": dialogue("Ho", "b")}, {}, "'chosen' continues beyond one answer"),
    ({"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", " ")}, {}, "field 'rejected' is empty after the last"),
    (RATED | {"responses": "x"}, {}, "field 'responses' is str, not a list"),
    (RATED | {"ratings": [1, 2]}, {}, "field 'ratings' holds 2 for 5 responses"),
    (RATED | {"ratings": 3}, {}, "field 'ratings' holds int for 5 responses"),
    (RATED | {"ratings": [1, 2, 3, 4, "N/A"]}, {}, "field 'ratings' has 'N/A' where a number should be"),
    (RATED | {"ratings": [1, 2, 3, 4, math.inf]}, {}, "field 'ratings' has inf where a number should be"),
    (RATED | {"responses": ["", *"acde"]}, {}, "field 'responses' holds an empty response"),
    (RATED | {"responses": [7, *"acde"]}, {}, "field 'responses' holds a response that is int, not a string"),
    ({"prompt": "p", "responses": ["a", "b"]}, {}, "field 'ratings' is missing (the row has 'prompt', 'responses')"),
    ({"prompt": "p", "responses": [{"text": "a"}]}, {}, "without any of rating, score, overall_score (it has 'text')"),
    (RATED | {"responses": [{"say": 1}] * 5}, {}, "without any of content, text, response (it has 'say')"),
]


@pytest.mark.parametrize(("row", "settings", "what"), BAD)
def test_bad_rows_are_named_by_field(row, settings, what):
    with pytest.raises(ValueError, match="^field '") as error:
        shape(**settings).read(row)
    assert what in str(error.value)


def test_unknown_columns_are_refused():
    with pytest.raises(
        ValueError, match=r"data\.columns\.promt: no such column; type one of prompt, chosen, rejected,"
    ):
        Shape(columns={"promt": "question"})


def test_the_defaults_of_a_config_are_those_of_the_shape():
    assert shape() == Shape(Format.auto, {}, Pick.best_worst, Label.first, False)
