"""Chat messages as rows hold them: read and checked, ShareGPT's names translated, a prompt not said twice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lab.core.pairs import Message

ROLES = dict(human="user", user="user", gpt="assistant", assistant="assistant", system="system", tool="tool")
UNREADABLE = re.compile("[\0\ud800-\udfff]")
MOST, LONGEST = 20, 80  # names, and characters of a value, that an error shows


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first items both share; the last one of each is never among them."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), max(most, 0))


def joined(given: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt's messages and then those that both sides begin with, without saying the prompt twice."""
    said, again = ([{**m, "content": m.get("content", "").strip()} for m in messages] for messages in (given, shared))
    is_whole = bool(again) and again[0]["role"] != "assistant"  # a dialogue from its start may hold the prompt
    if is_whole and any(again[i : i + len(said)] == said for i in range(len(again) - len(said) + 1)):
        return shared
    overlap = next(n for n in range(len(again), -1, -1) if again[:n] == said[max(len(said) - n, 0) :])
    return given + shared[overlap:]


def message(value: Any, where: str) -> Message:
    """One message: a role, and a string as its content unless it calls tools. ShareGPT's names are translated."""
    if not isinstance(value, dict):
        raise bad(where, f"holds {type(value).__name__} where a message should be")
    message = readable(value, where)
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if str(speaker) not in ROLES:
            raise bad(where, f"has a message from {brief(speaker)}, not from one of {', '.join(ROLES)}")
        message = {"role": ROLES[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise bad(where, f"has a message without a role (it {holds(message)})")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise bad(where, f"has a message whose content is {type(content).__name__}, not a string")
    return message


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise bad(where, f"has a content part of type {brief(kind)}: only text is supported")
    return part["text"]


def readable(value: Any, where: str) -> Any:
    """The value without its None entries (Arrow fills absent keys with them), every string in it checked, keys as well."""
    if isinstance(value, str):
        if found := UNREADABLE.search(value):
            what = "NUL character" if found[0] == "\0" else "lone surrogate"
            raise bad(where, f"has a {what} at position {found.start()}")
    elif isinstance(value, list):
        return [readable(item, where) for item in value]
    elif isinstance(value, dict):
        return {readable(key, where): readable(item, where) for key, item in value.items() if item is not None}
    elif value is not None and not isinstance(value, int | float):  # dates and bytes, which Arrow may hold
        raise bad(where, f"holds {type(value).__name__} where text, a number or a list should be")
    return value


def holds(value: Any) -> str:
    if isinstance(value, Mapping):
        names = ", ".join(map(brief, list(value)[:MOST])) or "none"
        return f"has {names[: 8 * LONGEST]}{', ...' if len(value) > MOST or len(names) > 8 * LONGEST else ''}"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {type(value).__name__}"


def brief(value: Any) -> str:
    """A value as an error shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def plain(role: str) -> str:
    return role if role in ROLES else brief(role)


def bad(where: str, what: str) -> ValueError:
    return ValueError(f"field '{where}' {what}")
