"""Chats to token ids and masks, id by id, under the templates of four families; and what a template can do wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data.chat import BadChat, Chat, NoTemplate
from dpo_lab.data.formats import Shape
from dpo_lab.data.tokenize import PairTokenizer
from tests.conftest import REPOSITORY
from tests.support.templates import FAMILIES, ids_of, tokenizer_of

FIXTURES = REPOSITORY / "tests" / "fixtures" / "formats"


def pairs_of(name: str, **shape) -> list[Pair]:
    rows = [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]
    return [pair for row in rows for pair in Shape(**shape).read(row)]


def encoded(family: str, *pairs: Pair, max_length: int = 4000, max_prompt_length: int = 3000):
    counts: Counter[str] = Counter()
    return PairTokenizer(tokenizer_of(family), max_length, max_prompt_length).pairs(pairs, counts), counts


def as_ids(family: str, *texts: str) -> list[list[int]]:
    return [ids_of(family, text) for text in texts]


def parts(pair: EncodedPair) -> list[list[int]]:
    return [list(pair.prompt), list(pair.chosen), list(pair.rejected)]


SHORT = Pair(
    [{"role": "user", "content": "Hi"}],
    [{"role": "assistant", "content": "Yes."}],
    [{"role": "assistant", "content": "Né."}],
)
LONG = replace(
    SHORT,
    prompt=[
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
)
BRIEF = replace(SHORT, prompt=[{"role": "system", "content": "Be brief."}, *SHORT.prompt])

RENDERED = [
    ("chatml", SHORT, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes.<|im_end|>", "Né.<|im_end|>"),
    (
        "chatml",
        BRIEF,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
        "Né.<|im_end|>",
    ),
    (
        "chatml",
        LONG,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Yes.<|im_end|>",
        "Né.<|im_end|>",
    ),
    (
        "llama3",
        BRIEF,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        "Né.<|eot_id|>",
    ),
    ("mistral", SHORT, "<s>[INST] Hi [/INST]", " Yes.</s>", " Né.</s>"),
    ("mistral", BRIEF, "<s>[INST] Be brief.\n\nHi [/INST]", " Yes.</s>", " Né.</s>"),
    ("mistral", LONG, "<s>[INST] One? [/INST] Two.</s>[INST] Three? [/INST]", " Yes.</s>", " Né.</s>"),
    (
        "gemma",
        LONG,
        "<bos><start_of_turn>user\nOne?<end_of_turn>\n<start_of_turn>model\nTwo.<end_of_turn>\n<start_of_turn>user\n"
        "Three?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
        "Né.<end_of_turn>",
    ),
]


@pytest.mark.parametrize(("family", "pair", "prompt", "chosen", "rejected"), RENDERED)
def test_families_id_by_id(family, pair, prompt, chosen, rejected):
    """The begin token once, the token that ends the turn once and learned, and nothing after it."""
    (found,), counts = encoded(family, pair)
    assert parts(found) == as_ids(family, prompt, chosen, rejected)
    assert not any(counts.values())


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.template])
def test_a_response_is_what_a_model_would_write_after_the_prompt(family):
    """Prompt and response joined are the rendered chat, but for what the template writes after the turn's end."""
    tokenizer = tokenizer_of(family)
    (found,), _ = encoded(family, SHORT)
    whole = tokenizer.apply_chat_template([*SHORT.prompt, *SHORT.chosen], tokenize=False)
    joined = tokenizer.decode([*found.prompt, *found.chosen])
    assert whole.startswith(joined)
    assert whole.removeprefix(joined).strip() == ""
    encoder = PairTokenizer(tokenizer, 400, 300)
    assert found.chosen[-1] in encoder.end_ids
    assert encoder.text(found.chosen).strip() == "Yes."
    assert encoder.end_ids[0] == tokenizer.eos_token_id


def chatml(turns: str) -> str:
    opened = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns.split("|"))
    return opened + "<|im_start|>assistant\n"


def test_conversational_file_id_by_id():
    found, _ = encoded("chatml", *pairs_of("chat"))
    expected = [
        ("system\nBe brief.|user\nHi", "Hello.", "What?"),
        ("user\nOne?|assistant\nTwo.|user\nThree?", "Four.", "Five."),
    ]
    assert [parts(pair) for pair in found] == [
        as_ids("chatml", chatml(turns), f"{chosen}<|im_end|>", f"{rejected}<|im_end|>")
        for turns, chosen, rejected in expected
    ]


def test_tools_id_by_id():
    pairs = pairs_of("tools")
    found, _ = encoded("chatml", *pairs)
    tools = json.dumps(pairs[0].tools, ensure_ascii=False)
    calls = json.dumps(pairs[0].prompt[1]["tool_calls"], ensure_ascii=False)
    prompt = chatml(f"system\nTools: {tools}|user\n2 + 3?|assistant\n{calls}|tool\n5")
    assert parts(found[0]) == as_ids("chatml", prompt, "It is 5.<|im_end|>", "It is 6.<|im_end|>")


def test_a_long_chat_keeps_its_end_and_its_begin_token():
    (found,), counts = encoded("llama3", LONG, max_prompt_length=40, max_length=44)
    (whole,), _ = encoded("llama3", LONG)
    assert list(found.prompt) == [*ids_of("llama3", "<|begin_of_text|>"), *whole.prompt[-39:]]
    assert list(found.chosen) == whole.chosen[:4]  # the turn's end went with the rest
    assert counts == {"prompts truncated": 1, "responses truncated": 2}
    (same,), _ = encoded("chatml", LONG, max_prompt_length=40)
    (all_of_it,), _ = encoded("chatml", LONG)
    assert list(same.prompt) == list(all_of_it.prompt[-40:])


def test_a_template_without_turn_ends_gets_the_end_token():
    tokenizer = tokenizer_of("plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    counts: Counter[str] = Counter()
    (pair,) = PairTokenizer(tokenizer, 400, 300).pairs([SHORT], counts)
    # it writes nothing where an answer begins, so the assistant's name is part of the answer
    assert parts(pair) == as_ids("plain", "user: Hi\n", "assistant: Yes.<|end|>", "assistant: Né.<|end|>")


def test_a_template_that_opens_an_answer_otherwise_keeps_what_is_common_and_counts_it():
    """A prompt that ends in '<think>' before answers that have none."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    counts: Counter[str] = Counter()
    (pair,) = PairTokenizer(tokenizer, 400, 300).pairs([SHORT], counts)
    assert parts(pair) == as_ids("chatml", chatml("user\nHi"), "Yes.<|im_end|>", "Né.<|im_end|>")
    assert counts["prompts without the opening of an answer that the chat template takes back"] == 1


def test_what_a_template_refuses_is_said():
    with pytest.raises(BadChat, match="System role not supported"):
        encoded("gemma", BRIEF)
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(BadChat, match="user and assistant must take turns"):
        encoded("mistral", replace(SHORT, prompt=turns))


def test_a_template_that_changes_its_prompt_once_it_is_answered_is_refused():
    """Some put the system words into the last message if it is the user: the common text would end before the question."""
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = tokenizer.chat_template.replace("loop.first and system", "loop.last and system")
    with pytest.raises(BadChat, match="writes the prompt otherwise once it is answered"):
        PairTokenizer(tokenizer, 400, 300).pairs([BRIEF], Counter())


def test_a_tokenizer_without_a_template_is_said():
    with pytest.raises(NoTemplate, match=r"no chat template; type policy.chat_template=FILE.jinja"):
        encoded("plain", SHORT)


def test_a_template_can_not_reach_out():
    """The renderer is a sandbox: attributes of Python's own are not to be had."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadChat, match="unsafe"):
        Chat(tokenizer).render([{"role": "user", "content": "a"}])
