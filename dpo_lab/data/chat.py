"""Render chat messages with the tokenizer's own template, in transformers' sandbox and under a time limit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo_lab.core.pairs import Message
from dpo_lab.data.content_checks import TAGS, BadChat
from dpo_lab.data.row_faults import DATE
from dpo_lab.data.time_limit import TimeLimitExceeded, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "xyzzy"  # what the probing of a template looks for
VALUE = "plugh"  # the argument of the tool call that it looks for
CALL = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"place": VALUE}}}
NOW = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(['"])([^'"]*)\1\s*\)""")
# How marks of turns are written: <|user|>, <start_of_turn>, [INST], <<SYS>>
MARK = re.compile(r"<\|[^|<>]{1,40}\|>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")
SECONDS = 5.0  # for one chat; templates take a thousandth of one
SHOWN = 200  # characters of what a template complains of
LONGEST = 10_000_000  # characters that a template may make of one chat
# What a template does with a chat that it is not made for
TEMPLATE_ERRORS = (TemplateError, TypeError, LookupError, AttributeError, ValueError, ZeroDivisionError, RecursionError)


class NoTemplate(Exception):
    """Chats, and a tokenizer without a chat template that can be used; the message says what to type."""


@dataclass
class Chat:
    """The chat template of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)  # type: ignore[attr-defined]

    def render(self, messages: Sequence[Message], tools: Any = None, answer_next: bool = False) -> str:
        """The text of a chat; answer_next: up to where the assistant's answer begins."""
        if not self.has_template:
            raise NoTemplate(
                "the pairs are chats, and the policy's tokenizer has no chat template; type policy.chat_template=FILE.jinja,"
                " or policy.path= of a model that was trained on chats"
            )
        if any(message.get("tool_calls") for message in messages) and self._takes_text:
            messages = [_with_text(message) for message in messages]
        return self._rendered(messages, tools, answer_next)

    def _rendered(self, messages: Sequence[Message], tools: Any = None, answer_next: bool = False) -> str:
        template = _dated(self.tokenizer.get_chat_template(None, tools)) if self.writes_date else None
        try:
            with time_limit(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=answer_next,
                    tokenize=False,
                )
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:SHOWN]
            raise BadChat(f"the chat template does not take it ({reason})") from None
        except (TimeLimitExceeded, MemoryError, OverflowError) as error:
            is_slow = isinstance(error, TimeLimitExceeded)
            what = f"works for more than {SECONDS:g} s" if is_slow else f"fails ({type(error).__name__})"
            raise NoTemplate(
                f"the chat template {what} on one chat; type another policy.chat_template=FILE.jinja"
            ) from None
        if len(text) > LONGEST:
            raise NoTemplate(
                f"the chat template makes {len(text):,} characters of one chat; type another policy.chat_template=FILE.jinja"
            )
        return str(text)

    def until_turn_end(self, answer: str) -> str:
        """An answer as rendered, up to and including the token that ends its turn."""
        after = self._after_answer
        return answer.removesuffix(after) + self.turn_end if after and answer.endswith(after) else answer

    @cached_property
    def turn_end(self) -> str:
        """What ends an answer: the template's text after it, up to its first special token; empty where there is none."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        ends = [self._after_answer.find(token) + len(token) for token in special if token in self._after_answer]
        return self._after_answer[: min(ends)] if ends else ""

    @cached_property
    def marks(self) -> tuple[list[str], list[str]]:
        """What the template writes around messages: marks of a turn, and tokens that begin or end a whole text."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        written = {token for token in special if token in self._probe} | set(MARK.findall(self._probe))
        ends = {str(self.tokenizer.bos_token), str(self.tokenizer.eos_token)}
        return sorted(mark for mark in written - ends if not TAGS.fullmatch(mark)), sorted(written & ends)

    @property
    def writes_date(self) -> bool:
        return "strftime_now" in str(self.tokenizer.chat_template)  # type: ignore[attr-defined]

    @property
    def _after_answer(self) -> str:
        """The template's text after an answer that is the last message."""
        return self._probe.rpartition(ANSWER)[2]

    @cached_property
    def _probe(self) -> str:
        """A chat of a user and the assistant as rendered, with a system message where the template wants one; else
        empty.
        """
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        for probe in (chat, [{"role": "system", "content": "b"}, *chat]):
            try:
                return self._rendered(probe)
            except BadChat:
                continue
        return ""

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template takes the arguments of a tool call as JSON text: an object it refuses, or prints as
        Python.
        """
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]
        for is_text in (False, True):
            try:
                text = self._rendered([_with_text(message) for message in chat] if is_text else chat)
            except BadChat:
                continue
            if VALUE in text and f"'{VALUE}'" not in text and f'\\"{VALUE}' not in text:
                return is_text
        return False


@cache
def _dated(template: str) -> str:
    """The template with DATE in place of the current date."""
    dated = NOW.sub(lambda call: json.dumps(DATE.strftime(call[2])), template)
    if "strftime_now(" in dated.replace(" ", ""):
        raise NoTemplate(
            "the chat template asks for the current date in a format that it computes, and the tokens would be others on"
            " every day; write a date into a copy of it and type policy.chat_template=FILE.jinja"
        )
    return dated


def _with_text(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_as_text(call) for call in calls]} if calls else message


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: _as_text(value) if key == "function" else value for key, value in call.items()}
    if isinstance(call.get("arguments"), dict):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return call
