"""A rendered chat holds what its messages say, or the row is refused by name; what may be left out is counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data import row_faults
from dpo_lab.data.chat import BadChat, NoTemplate
from dpo_lab.data.formats import Shape
from dpo_lab.data.tokenize import PairTokenizer
from tests.support.templates import ids_of, tokenizer_of

CALLS = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ ARGUMENTS }}){% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
AS_JSON = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
AS_TEXT = CALLS.replace("ARGUMENTS", "c.function.arguments")  # made for arguments that are JSON text
JOINED = CALLS.replace("ARGUMENTS", "'[' + c.function.arguments + ']'")  # fails on anything else
# As Qwen 3 does: reasoning of earlier turns is left out, that of the answer is written, however it came
QWEN3 = """\
{%- for m in messages %}
{%- set c = m.content %}{% set r = m.reasoning_content or '' %}
{%- if '</think>' in c %}
{%- set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + r | trim + '\\n</think>\\n\\n' }}{% endif %}
{{- c | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def chat(*prompt: dict, chosen="good", rejected="bad") -> Pair:
    sides = ([said("assistant", side)] if isinstance(side, str) else [side] for side in (chosen, rejected))
    return Pair(list(prompt) or [said("user", "Hi")], *sides)


def encoded(template: str | None, *pairs: Pair) -> tuple[list[EncodedPair], Counter[str], PairTokenizer]:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template or tokenizer.chat_template
    counts: Counter[str] = Counter()
    encoder = PairTokenizer(tokenizer, 4000, 3000)
    return encoder.pairs(pairs, counts), counts, encoder


def call(arguments, **more) -> dict:
    function = {"name": "find", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def read(prompt=None, **sides) -> Pair:
    (pair,) = Shape().read({"prompt": prompt or [said("user", "Hi")], **sides})
    return pair


THINKING = "<think>\nlong thought\n</think>\n\nyes"
CUTS = QWEN3.replace("and loop.last", "and false")


@pytest.mark.parametrize(
    ("template", "pair", "what"),
    [
        (CUTS, chat(chosen=THINKING), r"the reasoning of 'chosen' \('long thought'\).*or leave the reasoning out"),
        (
            CUTS,
            chat(rejected=said("assistant", "no", reasoning_content="since")),
            r"reasoning of 'rejected' \('since'\)",
        ),
        (
            QWEN3.replace("{{- c | trim +", "{{- (c | trim)[:3] +"),
            chat(chosen="a long answer"),
            r"the content of 'chosen' \('a long answer'\); type another policy.chat_template",
        ),
        (
            QWEN3.replace("messages %}", "messages if m.role != 'system' %}", 1),
            chat(said("system", "Be brief."), said("user", "Hi")),
            r"the content of message 1 of the prompt \(system\) \('Be brief.'\)",
        ),
        (
            AS_JSON.replace("{{ m.content or '' }}", "{{ '' if m.tool_calls else m.content }}"),
            chat(chosen=call({"a": 1}, content="I look it up.")),
            "the content of 'chosen'",
        ),
        (
            AS_JSON.replace("c.function.arguments", "{}"),
            chat(chosen=call({"a": 1})),
            "an argument of a tool call of 'chosen'",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(template, pair, what):
    with pytest.raises(BadChat, match=f"the chat template leaves out .*{what}"):
        encoded(template, pair)


def test_reasoning_of_the_answer_is_scored_and_that_of_earlier_turns_is_counted():
    pair = chat(
        said("user", "Hi"),
        said("assistant", THINKING),
        said("user", "And?"),
        chosen=THINKING,
        rejected="<think>no</think>no",
    )
    (found,), counts, _ = encoded(QWEN3, pair)
    assert list(found.chosen) == ids_of("chatml", "<think>\nlong thought\n</think>\n\nyes<|im_end|>")
    assert list(found.rejected) == ids_of("chatml", "<think>\nno\n</think>\n\nno<|im_end|>")
    assert counts[row_faults.REASONING] == 1
    apart = chat(said("user", "Hi"), chosen=said("assistant", "yes", reasoning_content="long thought"))
    (same,), counts, _ = encoded(QWEN3, apart)
    assert same.chosen == found.chosen
    assert counts[row_faults.REASONING] == 0


def test_white_space_at_the_ends_and_json_spelling_are_the_templates_business():
    spaced = chat(said("user", " Hi\n"), chosen="good \n", rejected='say "no"\n\n')
    assert len(encoded(QWEN3, spaced)[0]) == 1
    assert len(encoded(QWEN3.replace("{{- c | trim", "{{- c | trim | tojson"), spaced)[0]) == 1
    values = {"text": 'a "quoted" ü\n', "n": 1.5, "flag": True, "none": None, "list": [1, {"deep": "x"}]}
    assert len(encoded(AS_JSON, chat(chosen=call(values)))[0]) == 1


@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT, JOINED], ids=["object", "text", "joined"])
def test_a_tool_call_is_given_as_the_template_takes_it(template):
    """Whether arguments come as an object or as JSON text, they are written once and as JSON."""
    as_text = read(chosen=[call('{"place": "paris"}', content=None)], rejected=[said("assistant", "no")])
    as_object = read(chosen=[call({"place": "paris"})], rejected=[said("assistant", "no")])
    assert as_text.key == as_object.key
    (found,), _, encoder = encoded(template, as_text)
    text = encoder.text(found.chosen)
    assert '{"place": "paris"}' in text
    assert "None" not in text


def test_calls_may_be_json_text_as_a_whole():
    calls = json.dumps([{"type": "function", "function": {"name": "find", "arguments": '{"a": null}'}}])
    row = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert read(chosen=row, rejected="no").chosen[0]["tool_calls"][0]["function"]["arguments"] == {"a": None}  # type: ignore[index]


@pytest.mark.parametrize("text", ["{'a': 1}", "[1]", "paris"])
def test_arguments_that_are_no_json_of_an_object_are_refused(text):
    with pytest.raises(ValueError, match="field 'chosen' has arguments of a tool call that are"):
        read(chosen=[call(text)], rejected="no")


def test_a_null_argument_is_a_value_and_a_null_field_is_none():
    """Two calls that differ by a null are two; fields of a message that OpenAI's API fills with null are absent."""
    row = {"chosen": [call({"a": 1, "b": None})], "rejected": [call({"a": 1})]}
    pair = read(**row)
    (found,), _, encoder = encoded(AS_JSON, pair)
    assert '"b": null' in encoder.text(found.chosen)
    assert "b" not in encoder.text(found.rejected)
    filled = said("assistant", "x", refusal=None, tool_calls=None, function_call=None)
    assert read(chosen=[filled], rejected="y").chosen == [said("assistant", "x")]


def test_a_template_that_wants_a_system_message_ends_a_turn_once():
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    (found,), _, encoder = encoded(wants + QWEN3, chat(said("system", "b"), said("user", "Hi"), chosen="a "))
    assert encoder.end_ids == (encoder.eos_id,)
    assert [list(side).count(encoder.eos_id) for side in (found.chosen, found.rejected)] == [1, 1]
    assert found.chosen[-1] == encoder.eos_id
    with pytest.raises(BadChat, match="system first"):
        encoded(wants + QWEN3, chat())


@pytest.mark.parametrize(
    ("family", "content"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        ("mistral", "[INST] Hi [/INST]"),
        ("gemma", "<start_of_turn>user\nHi<end_of_turn>"),
    ],
)
def test_a_message_that_was_rendered_already_is_refused(family, content):
    for pair in (chat(said("user", content)), chat(chosen=content)):
        with pytest.raises(
            BadChat, match="which the chat template writes around messages itself: was it rendered already"
        ):
            PairTokenizer(tokenizer_of(family), 4000, 3000).pairs([pair], Counter())


def test_html_that_is_spelled_as_a_begin_token_is_counted():
    counts: Counter[str] = Counter()
    struck = chat(said("user", "Is <s>this</s> struck?"))
    assert len(PairTokenizer(tokenizer_of("mistral"), 4000, 3000).pairs([struck], counts)) == 1
    assert counts[row_faults.SPECIAL] == 1


def test_sides_that_are_the_same_tokens_untruncated_are_called_so():
    pairs, counts, _ = encoded(QWEN3, chat(chosen="good", rejected="good\n"))
    assert pairs == []
    assert counts["dropped: identical as tokens"] == 1
    assert counts["dropped: identical after truncation"] == 0


def test_tools_that_the_template_leaves_out_are_counted():
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    (pair,) = Shape().read({"prompt": [said("user", "Hi")], "chosen": "a", "rejected": "b", "tools": [tool]})
    assert encoded(QWEN3, pair)[1][row_faults.TOOLS] == 1
    assert encoded(None, pair)[1][row_faults.TOOLS] == 0


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + QWEN3


def test_a_template_with_a_date_has_the_same_tokens_on_every_day(monkeypatch):
    (first,), counts, encoder = encoded(DATED, chat())
    assert encoder.prompt_text(first.prompt).startswith("Today: 26 Jul 2024\n")
    assert counts[row_faults.DATED] == 1

    class Later:
        @staticmethod
        def now():
            return row_faults.DATE.replace(year=2031)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    (second,), _, again = encoded(DATED, chat())
    assert second.prompt == first.prompt
    assert again.fingerprint == encoder.fingerprint
    with pytest.raises(NoTemplate, match="asks for the current date in a format that it computes"):
        encoded(DATED.replace("'%d %b %Y'", "'%d' + ' %b'"), chat())


def test_the_date_is_part_of_the_fingerprint(monkeypatch):
    before, plain = encoded(DATED, chat())[2].fingerprint, encoded(QWEN3, chat())[2].fingerprint
    monkeypatch.setattr("dpo_lab.data.tokenize.DATE", row_faults.DATE.replace(year=2025))
    assert encoded(DATED, chat())[2].fingerprint != before
    assert encoded(QWEN3, chat())[2].fingerprint == plain
