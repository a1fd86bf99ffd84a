"""Read and check chat messages as rows hold them, translate ShareGPT's names, and remove a repeated prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lab.core.pairs import Message, Text

ROLES = dict(human="user", user="user", gpt="assistant", assistant="assistant", system="system", tool="tool")
UNREADABLE = re.compile("[\0\ud800-\udfff]")
LARGEST = 1e37  # the largest number: differences are stored in 32 bits
MOST, LONGEST = 20, 80  # names, and characters of a value, to show in an error


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences, without the last item of either."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), max(most, 0))


def shared_messages(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Return the number of common first messages after which both dialogues go on with a message of the assistant."""
    common = shared(a, b)
    while common and any(side[common]["role"] != "assistant" for side in (a, b)):
        common -= 1
    return common


def shared_words(a: str, b: str) -> int:
    """Return the length in characters of the longest common prefix of whole words, the implicit prompt of two texts.

    Both texts continue with white space after it, which belongs to the responses, and neither response is empty. It is
    measured in characters: a common prefix of tokens would depend on the tokenizer and could end inside a word, where
    prompt and response have other tokens than the complete text.

    >>> shared_words("The sky is blue.", "The sky is blurred.")
    10
    """
    longest = min(shared(a, b), len(a.rstrip()) - 1, len(b.rstrip()) - 1)
    cuts = (i for i in range(longest, 0, -1) if a[i].isspace() and b[i].isspace() and not a[i - 1].isspace())
    return next(cuts, 0)


def merge_messages(given: list[Message], shared: list[Message]) -> list[Message]:
    """Return the prompt's messages followed by those that both responses share, without repeating the prompt."""
    first, second = ([{**m, "content": m.get("content", "").strip()} for m in part] for part in (given, shared))
    is_dialogue = bool(second) and second[0]["role"] != "assistant"  # a complete dialogue may contain the prompt
    if is_dialogue and any(second[i : i + len(first)] == first for i in range(len(second) - len(first) + 1)):
        return shared
    overlap = next(n for n in range(len(second), -1, -1) if second[:n] == first[max(len(first) - n, 0) :])
    return given + shared[overlap:]


def message(value: Any, where: str) -> Message:
    """Check a message and translate ShareGPT's names: it has a role and a string as content, unless it calls tools.

    A field of a message, of a tool call or of its function that is null is treated as absent, as in OpenAI's API. A
    null in the arguments of a call is a value and is kept. Raises ValueError, naming the field.
    """
    if not isinstance(value, dict):
        raise field_error(where, f"holds {type(value).__name__} where a message should be")
    message = _without_nulls(readable(value, where))
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if str(speaker) not in ROLES:
            raise field_error(where, f"has a message from {shorten(speaker)}, not from one of {', '.join(ROLES)}")
        message = {"role": ROLES[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise field_error(where, f"has a message without a role (it {describe(message)})")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise field_error(where, f"has a message whose content is {type(content).__name__}, not a string")
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], where)
    return message


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check tool calls and parse their arguments to objects; calls and arguments may be JSON text."""
    calls = _from_json(calls, where, "tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise field_error(where, "has tool_calls that are not a list of objects")
    parsed = []
    for call in map(_without_nulls, calls):
        if isinstance(call.get("function"), dict):
            call["function"] = _with_arguments(_without_nulls(call["function"]), where)
        parsed.append(_with_arguments(call, where))
    return parsed


def _with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(text := function.get("arguments"), str):
        arguments = _from_json(text.strip() or "{}", where, "arguments of a tool call")
        if not isinstance(arguments, dict):
            raise field_error(
                where, f"has arguments of a tool call that are {shorten(text)}, not the JSON of an object"
            )
        function["arguments"] = arguments
    return function


def _from_json(value: Any, where: str, what: str) -> Any:
    """Return the value, parsed if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return readable(json.loads(value), where)
    except (json.JSONDecodeError, RecursionError):
        raise field_error(where, f"has {what} that are not JSON: {shorten(value)}") from None


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise field_error(where, f"has a content part of type {shorten(kind)}: only text is supported")
    return part["text"]


def readable(value: Any, where: str) -> Any:
    """Check all strings in a value, keys included, and return it; raise ValueError for NUL or lone surrogates."""
    if isinstance(value, str):
        if found := UNREADABLE.search(value):
            what = "NUL character" if found[0] == "\0" else "lone surrogate"
            raise field_error(where, f"has a {what} at position {found.start()}")
    elif isinstance(value, list):
        return [readable(item, where) for item in value]
    elif isinstance(value, dict):
        return {readable(key, where): readable(item, where) for key, item in value.items()}
    elif value is not None and not isinstance(value, int | float):  # dates and bytes, which Arrow may hold
        raise field_error(where, f"holds {type(value).__name__} where text, a number or a list should be")
    return value


def content_of(text: Text) -> str:
    """Return a plain text, or the content of the last message of a chat."""
    return text if isinstance(text, str) else str((text[-1].get("content") if text else "") or "")


def describe(value: Any) -> str:
    """Describe a value in an error: the names in an object, the length of a list, or the type."""
    if isinstance(value, Mapping):
        names = ", ".join(map(shorten, list(value)[:MOST])) or "none"
        return f"has {names[: 8 * LONGEST]}{', ...' if len(value) > MOST or len(names) > 8 * LONGEST else ''}"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {type(value).__name__}"


def shorten(value: Any) -> str:
    """Return the repr of a value, truncated for an error message."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def show_role(role: str) -> str:
    """Return a role as an error shows it."""
    return role if role in ROLES else shorten(role)


def field_error(where: str, what: str) -> ValueError:
    """Return the error of a field. where: its name; what: what is wrong, with a verb."""
    return ValueError(f"field '{where}' {what}")


def number(value: Any, where: str) -> float:
    """Convert a number, or text of one, to float; None to NaN."""
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if abs(number) > LARGEST or isinstance(value, bool):
        raise field_error(where, f"has {shorten(value)} where a number should be")
    return number


def first(item: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """Return the value of the first of `names` that the item has."""
    for name in names:
        if name in item:
            return item[name]
    raise field_error(where, f"holds a response without any of {', '.join(names)} (it {describe(item)})")
