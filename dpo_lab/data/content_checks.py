"""Check that a chat as its template renders it holds what the messages say: contents, reasoning and tool calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_lab.core.pairs import Message, Pair
from dpo_lab.data import row_faults

THOUGHT = "the reasoning"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TAGS = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|scratchpad)>|\[(/?)THINK\]")
PYTHON = {"true": "True", "false": "False", "null": "None"}  # JSON values as some templates print them
SHOWN = 40  # characters of a missing part to show

Part = tuple[str, str]  # name and text of a part of a message


class BadChat(ValueError):
    """Raised where the template can't render a chat, or leaves out a part of it; the message says why."""


def check_content(pair: Pair, prompt: str, wholes: Sequence[str], start: int, counts: Counter[str]) -> None:
    """Raise BadChat if a rendered text lacks a part of a message.

    prompt, wholes: the rendered chat up to the answer, and with each of the answers; start: offset of the answers.
    The template may leave out the reasoning of earlier turns, which is counted, but not that of an answer, which is
    scored.
    """
    loses_reasoning = False
    for number, message in enumerate(_messages(pair.prompt), start=1):
        lost = _lost(message, prompt, 0)
        others = [part for part in lost if part[0] != THOUGHT]
        loses_reasoning |= len(others) < len(lost)
        _refuse(f"message {number} of the prompt ({message['role']})", others)
    for (name, side), whole in zip(pair.responses.items(), wholes, strict=True):
        for message in _messages(side):
            _refuse(f"'{name}'", _lost(message, whole, start))
    if loses_reasoning:
        counts[row_faults.REASONING] += 1
    if not all(_is_in(name, prompt, 0) for name in map(_function_name, pair.tools or ()) if name):
        counts[row_faults.TOOLS] += 1


def check_marks(pair: Pair, turns: Sequence[str], ends: Sequence[str], counts: Counter[str]) -> None:
    """Raise BadChat if a message contains a mark of a turn of the template, so was probably rendered already.

    turns: these marks; ends: begin and end tokens of a text, which are only counted in prompts since they may be HTML.
    """
    has_ends = False
    for name, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        for content in (message.get("content") or "" for message in _messages(messages)):
            if mark := next((mark for mark in turns if mark in content), None):
                raise BadChat(
                    f"a message of '{name}' holds {mark!r}, which the chat template writes around messages itself: was"
                    " it rendered already? Give messages without a template's marks, or all of it as plain strings"
                )
            has_ends |= name == "prompt" and any(mark in content for mark in ends)
    if has_ends:
        counts[row_faults.SPECIAL] += 1


def _messages(text: Any) -> list[Message]:
    assert not isinstance(text, str)
    return text


def _refuse(where: str, lost: Sequence[Part]) -> None:
    if lost:
        what, words = lost[0]
        line = " ".join(words.split())
        shown = line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
        remedy = ", or leave the reasoning out of the rows" if what == THOUGHT else ""
        raise BadChat(
            f"the chat template leaves out {what} of {where} ({shown!r});"
            f" type another policy.chat_template=FILE.jinja{remedy}"
        )


def _lost(message: Message, text: str, start: int) -> list[Part]:
    """Return the parts of a message that are not in text[start:].

    Parts are compared without white space at both ends, and also as JSON strings. Reasoning tags are not compared: the
    template may write other ones.
    """
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str) and text.find(content.strip(), start) >= 0:
        return []  # the common case: only role and content
    return [part for part in _parts(message) if not _is_in(part[1], text, start)]


def _parts(message: Message) -> Iterator[Part]:
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            yield THOUGHT, message[key]
    if isinstance(content := message.get("content"), str):
        start = 0
        for tag in TAGS.finditer(content):
            is_closing = bool(tag[1] or tag[2])
            yield (THOUGHT if is_closing else "the content"), content[start : tag.start()]
            start = tag.end()
        yield "the content", content[start:]
    for call in message.get("tool_calls") or ():
        if name := _function_name(call):
            yield "the name of a tool call", name
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        for value in _leaves(function.get("arguments")):
            yield "an argument of a tool call", value


def _function_name(tool: dict[str, Any]) -> str | None:
    """Return the function name of a tool or of a tool call, or None."""
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    return function["name"] if isinstance(function.get("name"), str) else None


def _leaves(value: Any) -> Iterator[str]:
    """Yield keys and values of tool arguments as text; the template chooses their order and spacing."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _is_in(words: str, text: str, start: int) -> bool:
    words = words.strip()
    if text.find(words, start) >= 0:
        return True
    spellings = (json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1], PYTHON.get(words, words))
    return any(text.find(spelling, start) >= 0 for spelling in spellings)
