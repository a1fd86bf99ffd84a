"""Parse chat messages that a row stores as JSON text."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_lab.data.messages import ROLES
from dpo_lab.data.row_faults import JSON_LEFT, JSON_READ

LISTS = ("messages", "conversations", "conversation")  # keys of an object that may hold its messages
BEGINS = re.compile(
    r"""\s*(?:\[\s*)?\{\s*['"](?:role|content|from|value|tools|messages|conversations?|tool_calls)['"]\s*:"""
)
SPEAKER = re.compile(r"""['"](?:role|from)['"]\s*:""")
SPEAKERS = {*ROLES, "developer", "function", "ipython"}


class TextChat(NamedTuple):
    """The messages, and the tools if there are any, of a chat stored as JSON text."""

    messages: list[dict[str, Any]]
    tools: Any


def read_json_text(found: Mapping[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """Return messages by name (prompt, chosen, rejected; tools) for the values of a row that are the JSON of a chat.

    A prompt is parsed if all of it is a chat. Responses are parsed if both are chats that end with the assistant, and
    the prompt is a chat, is missing, or is one of their messages: the answer to a plain question may be JSON itself.
    Values that look like JSON of messages and are not parsed are counted.
    """
    chats = {name: chat for name, value in found.items() if (chat := chat_of(value)) is not None}
    prompt, sides = found.get("prompt"), [chats[name] for name in ("chosen", "rejected") if name in chats]
    read = {name: chat.messages for name, chat in chats.items() if name == "prompt"}
    is_chat = not isinstance(prompt, str) or "prompt" in read or all(_contains(side, prompt) for side in sides)
    if len(sides) == 2 and is_chat and all(_is_by_assistant(side.messages[-1]) for side in sides):
        read |= {"chosen": sides[0].messages, "rejected": sides[1].messages}
    tools = [chats[name].tools for name in chats if name in read and chats[name].tools]
    if read:
        counts[JSON_READ] += 1
    if any(isinstance(value, str) and name not in read and _looks_like(value) for name, value in found.items()):
        counts[JSON_LEFT] += 1
    return read | ({"tools": tools[0]} if tools else {})


def chat_of(text: Any) -> TextChat | None:
    """Parse a text that is a chat; return None if it is not.

    A chat is a message, a list of messages, or an object that holds such a list under one of LISTS. A message has a
    known role and a content or tool calls, or is from one of ShareGPT's speakers. Python's notation is accepted as
    well: pandas writes it to CSV.
    """
    if not isinstance(text, str) or not BEGINS.match(text):
        return None
    value = _parsed(text)
    tools = None
    if isinstance(value, dict):
        tools, chat = value.get("tools"), value
        value = next((chat[name] for name in LISTS if isinstance(chat.get(name), list)), [chat])
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        return None
    return TextChat(value, tools)


def _looks_like(text: str) -> bool:
    return bool(BEGINS.match(text)) and SPEAKER.search(text) is not None


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "role" in value:
        return value["role"] in SPEAKERS and ("content" in value or "tool_calls" in value)
    return value.get("from") in SPEAKERS and isinstance(value.get("value"), str)


def _is_by_assistant(message: dict[str, Any]) -> bool:
    return ROLES.get(str(message.get("role", message.get("from")))) == "assistant"


def _contains(chat: TextChat, prompt: str) -> bool:
    contents = (message.get("content", message.get("value")) for message in chat.messages)
    return any(isinstance(text, str) and text.strip() == prompt.strip() for text in contents)
