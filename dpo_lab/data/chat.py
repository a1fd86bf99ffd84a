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
from dpo_lab.errors import LabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "xyzzy"  # the answer in the chat that probes a template
VALUE = "plugh"  # the tool-call argument in the chat that probes a template
CALL = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"place": VALUE}}}
NOW = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(['"])([^'"]*)\1\s*\)""")
# Marks of turns: <|user|>, <start_of_turn>, [INST], <<SYS>>
MARK = re.compile(r"<\|[^|<>]{1,40}\|>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS = 5.0  # time limit per chat; templates take about a millisecond
SHOWN = 200  # characters of a template's error to show
LONGEST = 10_000_000  # the most characters of a rendered chat
# Errors of a template on a chat that it does not support
TEMPLATE_ERRORS = (TemplateError, TypeError, LookupError, AttributeError, ValueError, ZeroDivisionError, RecursionError)


class NoTemplate(LabError):
    """Raised for chats if the tokenizer has no chat template that can be used; the message says what to type."""


@dataclass
class Chat:
    """The chat template of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)  # type: ignore[attr-defined]

    def render(self, messages: Sequence[Message], tools: Any = None, answer_next: bool = False) -> str:
        """Render a chat to text; answer_next: with the opening of the assistant's answer (add_generation_prompt).

        Raises BadChat if the template does not support the chat, NoTemplate if no chat can be rendered.
        """
        if not self.has_template:
            raise NoTemplate(
                "the pairs are chats, and the policy's tokenizer has no chat template; type"
                " policy.chat_template=FILE.jinja, or policy.path= of a model that was trained on chats"
            )
        return self._rendered(self._as_taken(messages), tools, answer_next)

    @property
    def has_generation_marks(self) -> bool:
        return bool(GENERATION.search(str(self.tokenizer.chat_template)))  # type: ignore[attr-defined]

    def generated(self, messages: Sequence[Message], tools: Any, rendered: str) -> list[tuple[int, int]]:
        """Return the spans of a rendered chat that the template marks as the assistant's, by {% generation %}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, tools)
        rendered_chats: Any = render_jinja_template(
            [list(self._as_taken(messages))],
            tools=tools,
            chat_template=_dated(template) if self.writes_date else template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,  # type: ignore[arg-type]
        )
        (text,), (spans,) = rendered_chats
        if text != rendered:
            raise BadChat("the chat template writes another text where its generation marks are read")
        return spans

    def _as_taken(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages with the arguments of tool calls as the template needs them."""
        if any(message.get("tool_calls") for message in messages) and self._takes_text:
            return [_with_text(message) for message in messages]
        return messages

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
            raise BadChat(f"the chat template can't render it ({reason})") from None
        except (TimeLimitExceeded, MemoryError, OverflowError) as error:
            is_slow = isinstance(error, TimeLimitExceeded)
            what = f"takes more than {SECONDS:g} s" if is_slow else f"fails ({type(error).__name__})"
            raise NoTemplate(
                f"the chat template {what} on one chat; type another policy.chat_template=FILE.jinja"
            ) from None
        if len(text) > LONGEST:
            raise NoTemplate(
                f"the chat template writes {len(text):,} characters on one chat;"
                " type another policy.chat_template=FILE.jinja"
            )
        return str(text)

    def until_turn_end(self, answer: str) -> str:
        """Truncate a rendered answer after the token that ends its turn."""
        after = self._after_answer
        return answer.removesuffix(after) + self.turn_end if after and answer.endswith(after) else answer

    @cached_property
    def turn_end(self) -> str:
        """The template's text after an answer, up to and including its first special token; empty without one."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        ends = [self._after_answer.find(token) + len(token) for token in special if token in self._after_answer]
        return self._after_answer[: min(ends)] if ends else ""

    @cached_property
    def marks(self) -> tuple[list[str], list[str]]:
        """The marks that the template writes around messages: those of a turn, and begin and end tokens of a text."""
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
        """The template's text after an answer in the last message."""
        return self._probe.rpartition(ANSWER)[2]

    @cached_property
    def _probe(self) -> str:
        """A rendered chat of a user and the assistant, with a system message if the template requires one; "" if
        neither can be rendered.
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
        """Whether the template needs the arguments of a tool call as JSON text: it rejects an object, or prints it as
        Python does.
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
    """Replace the current date in a template by DATE; raise NoTemplate if its format is not a literal."""
    dated = NOW.sub(lambda call: json.dumps(DATE.strftime(call[2])), template)
    if "strftime_now(" in dated.replace(" ", ""):
        raise NoTemplate(
            "the chat template asks for the current date in a format that it computes, so the tokens would differ from day"
            " to day; write a date into a copy of it and type policy.chat_template=FILE.jinja"
        )
    return dated


def _with_text(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_as_text(call) for call in calls]} if calls else message


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: _as_text(value) if key == "function" else value for key, value in call.items()}
    if isinstance(call.get("arguments"), dict):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return call
