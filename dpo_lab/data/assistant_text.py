"""Find which text of a rendered response of several messages the assistant wrote: by generation marks, else by prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_lab.core.pairs import Message
from dpo_lab.data.chat import Chat
from dpo_lab.data.content_checks import BadChat

Span = tuple[int, int]
REMEDY = "; type another policy.chat_template=FILE.jinja, or one with {% generation %} around the assistant's text"


def split_response(
    chat: Chat, prompt: Sequence[Message], response: Sequence[Message], tools: Any, whole: str, start: int
) -> list[str]:
    """Split the rendered text of a response into what the assistant wrote and what others wrote, in turn.

    whole: the rendered prompt and response; start: offset of the response. The assistant's text comes first, maybe empty,
    and last; it includes the token that ends a turn. Text after it is left out. Raises BadChat where it can't be told.
    """
    if chat.has_generation_marks:
        spans = chat.generated([*prompt, *response], tools, whole)
    else:
        spans = _by_prefixes(chat, prompt, response, tools, whole)
        spans[0] = start, spans[0][1]  # as for a response of one message, also where the template opens it otherwise
    pieces, at, end_of_turn = [""], start, chat.turn_end
    for begin, end in spans:
        if whole.startswith(end_of_turn, end):
            end += len(end_of_turn)
        if end <= at:
            continue  # of the prompt
        if begin > at:
            pieces += [whole[at:begin], ""]
        pieces[-1] += whole[max(begin, at) : end]
        at = end
    if at == start:
        raise BadChat("the chat template's generation marks hold nothing of a response; correct the template")
    return pieces


def _by_prefixes(
    chat: Chat, prompt: Sequence[Message], response: Sequence[Message], tools: Any, whole: str
) -> list[Span]:
    """Return the text that each message of the assistant adds to the rendered messages before it."""
    if not chat.turn_end:
        raise BadChat(f"the chat template ends no turn by a special token, which several messages need{REMEDY}")
    messages, spans = [*prompt, *response], []
    for at in range(len(prompt), len(messages)):
        if messages[at]["role"] != "assistant":
            continue
        before, opened = (chat.render(messages[:at], tools, answer_next=opens) for opens in (False, True))
        begin = len(common_prefix(opened, whole))
        text = chat.until_turn_end(chat.render(messages[: at + 1], tools))
        if begin < len(before) or len(text) < begin or not whole.startswith(text):
            number = at - len(prompt) + 1
            raise BadChat(
                f"the chat template writes message {number} of a response otherwise once others follow{REMEDY}"
            )
        spans.append((begin, len(text)))
    return spans


def common_prefix(*texts: str) -> str:
    """Return the longest common prefix."""
    columns = enumerate(zip(*texts, strict=False))
    return texts[0][: next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))]
