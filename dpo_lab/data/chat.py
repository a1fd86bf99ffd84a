"""Chats as text, by the tokenizer's own template, which transformers renders in a sandbox, and which has so much time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo_lab.core.pairs import Message
from dpo_lab.data.time_limit import TimeIsUp, at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "xyzzy"  # what the probing of a template looks for
SECONDS = 5.0  # for one chat; templates take a thousandth of one
SHOWN = 200  # characters of what a template complains of
LONGEST = 10_000_000  # characters that a template may make of one chat
# What a template does with a chat that it is not made for
REFUSES = (TemplateError, TypeError, LookupError, AttributeError, ValueError, ZeroDivisionError, RecursionError)


class BadChat(ValueError):
    """A chat that the template does not take; the message says why."""


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
        try:
            with at_most(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=answer_next, tokenize=False
                )
        except REFUSES as error:
            reason = " ".join(str(error).split())[:SHOWN]
            raise BadChat(f"the chat template does not take it ({reason})") from None
        except (TimeIsUp, MemoryError, OverflowError) as error:
            is_slow = isinstance(error, TimeIsUp)
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
    def _after_answer(self) -> str:
        """The template's text after an answer that is the last message."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            return self.render(probe).rpartition(ANSWER)[2]
        except BadChat:
            return ""
