"""Rows of preference data in any of the usual shapes, as pairs."""

from __future__ import annotations

import json
import math
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import combinations
from typing import Any

from dpo_lab.core.pairs import Message, Pair, Text

COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "tools", "responses", "ratings"),
    *("score_chosen", "score_rejected", "label"),
)
SCORES = {
    side: (f"score_{side}", f"{side}_score", f"{side}-rating", f"{side}_rating") for side in ("chosen", "rejected")
}
RESPONSE_TEXT = ("content", "text", "response")
RESPONSE_RATING = ("rating", "score", "overall_score")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"} | {
    "system": "system",
    "tool": "tool",
}
TURN = re.compile(r"\n\n(Human|Assistant):")
UNREADABLE = re.compile("[\0\ud800-\udfff]")
ABSENT: Any = object()


class Format(str, Enum):
    """The shape of a row; auto finds it from the row's fields."""

    auto = "auto"
    preference = (
        "preference"  # prompt, chosen, rejected: strings or chat messages; without prompt, what both sides share
    )
    transcript = "transcript"  # chosen, rejected: a whole dialogue each, "\n\nHuman: ...\n\nAssistant: ..."
    ratings = "ratings"  # prompt, responses, ratings


class Pick(str, Enum):
    """How rated responses become pairs; of equally rated ones the first is taken."""

    best_worst = "best_worst"  # the best against the worst: one pair a row
    best_rest = "best_rest"  # the best against every other
    all = "all"  # every two with different ratings


class Label(str, Enum):
    """What a label of 1 says of two responses that stand in no order."""

    first = "first"  # the first is preferred (0: the second)
    index = "index"  # the one with index 1, the second, is preferred (0: the first)


class NoPair(Exception):
    """A well-formed row that holds no preference; the message is the reason to count."""


@dataclass
class Shape:
    """How the rows of a source are read as pairs.

    columns: our name -> the row's, a dotted path where it lies deeper (`summaries.0.text`). `system`, `tools` and the usual
    names of scores are found without; a label is read only where `columns` names it, for it may turn the pair around.
    pick: which pairs rated responses make; label_is: how a label is meant. as_chat: plain strings become messages, the
    prompt the user's (after `system`, where the row has one) and a response the assistant's.
    """

    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)
    pick: Pick = Pick.best_worst
    label_is: Label = Label.first
    as_chat: bool = False

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMNS:
                raise ValueError(f"data.columns.{name}: no such column; type one of {', '.join(COLUMNS)}")

    def pairs(self, row: Mapping[str, Any]) -> list[Pair]:
        """All pairs of a row.

        Raises ValueError, naming the field, for a bad row; NoPair where it is good but holds no preference.
        """
        kind = self._recognise(row) if self.format is Format.auto else self.format
        if kind is Format.ratings:
            return self._rated(row)
        pair = self._transcript(row) if kind is Format.transcript else self._preference(row)
        pair = replace(pair, score_margin=self._score(row, "chosen") - self._score(row, "rejected"))
        if self._is_turned(row):
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen, score_margin=-pair.score_margin)
        if pair.chosen == pair.rejected:
            raise NoPair("identical sides")
        return [pair]

    def _recognise(self, row: Mapping[str, Any]) -> Format:
        has = {name for name in COLUMNS if name in row or name in self.columns}
        if "responses" in has and "chosen" not in has:
            return Format.ratings
        sides = [self._get(row, name, None) for name in ("chosen", "rejected")]
        if all(isinstance(s, str) and s.startswith("\n\nHuman:") and "\n\nAssistant:" in s for s in sides):
            return Format.transcript
        return Format.preference

    def _field(self, name: str) -> str:
        return self.columns.get(name, name)

    def _get(self, row: Mapping[str, Any], name: str, default: Any = ABSENT) -> Any:
        """The row's value under our name. A row may lack one that has a default, unless `columns` promises it."""
        path = self._field(name)
        if path in row:
            return row[path]
        if name not in self.columns and default is not ABSENT:
            return default
        value: Any = row
        steps = path.split(".")
        for i, step in enumerate(steps):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                owner = f"'{'.'.join(steps[:i])}'" if i else "the row"
                raise ValueError(f"field '{'.'.join(steps[: i + 1])}' is missing ({owner} {_content(value)})")
        return value

    def _text(self, row: Mapping[str, Any], name: str) -> Text:
        """A prompt or a side: a string or messages, checked; a side is not empty."""
        value, where = self._get(row, name), self._field(name)
        if not isinstance(value, str | list | dict):
            raise ValueError(f"field '{where}' is {type(value).__name__}, not a string or a list of messages")
        text = _readable(value, where) if isinstance(value, str) else _messages(value, where)
        if name != "prompt" and not (text.strip() if isinstance(text, str) else text):
            raise ValueError(f"field '{where}' is empty")
        return text

    def _score(self, row: Mapping[str, Any], side: str) -> float:
        name = f"score_{side}"
        if name in self.columns:
            return _number(self._get(row, name), self._field(name))
        return next((_number(row[key], key) for key in SCORES[side] if key in row), math.nan)

    def _is_turned(self, row: Mapping[str, Any]) -> bool:
        """Whether the label says that the response under `rejected` is the preferred one."""
        if "label" not in self.columns:
            return False
        label = self._get(row, "label")
        if label not in (0, 1):
            raise ValueError(f"field '{self._field('label')}' is {label!r}, not 0 or 1")
        return bool(label) is (self.label_is is Label.index)

    def _tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        tools, where = self._get(row, "tools", None), self._field("tools")
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise ValueError(f"field '{where}' is not JSON ({error.msg} at column {error.colno})") from None
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"field '{where}' is {type(tools).__name__}, not a list of objects")
        return _readable(tools, where)

    def _system(self, row: Mapping[str, Any]) -> str:
        system, where = self._get(row, "system", None) or "", self._field("system")
        if not isinstance(system, str):
            raise ValueError(f"field '{where}' is {type(system).__name__}, not a string")
        return _readable(system, where)

    def _preference(self, row: Mapping[str, Any]) -> Pair:
        chosen, rejected = self._text(row, "chosen"), self._text(row, "rejected")
        if "prompt" in row or "prompt" in self.columns:
            return self._pair(row, self._text(row, "prompt"), chosen, rejected)
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            return self._pair(row, [], chosen, rejected)
        if chosen == rejected:
            raise NoPair("identical sides")
        cut = shared_words(chosen, rejected)
        if not cut:
            raise ValueError(
                f"field 'prompt' is missing and both sides share no first word (the row {_content(row)});"
                " type data.columns.prompt=NAME where the prompt has another name"
            )
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        return self._pair(row, prompt, *(s.lstrip() if self.as_chat else s for s in (chosen, rejected)))

    def _transcript(self, row: Mapping[str, Any]) -> Pair:
        sides = []
        for name in ("chosen", "rejected"):
            text = self._text(row, name)
            before, *parts = TURN.split(text) if isinstance(text, str) else [""]
            if before or not parts:
                raise ValueError(f"field '{self._field(name)}' is no transcript: it must begin with '\\n\\nHuman:'")
            sides.append(list(zip(parts[::2], parts[1::2], strict=True)))
        shared = sides[0][: _shared(*sides)]
        answers = []
        for name, turns in zip(("chosen", "rejected"), sides, strict=True):
            speakers = [speaker for speaker, _ in turns[len(shared) :]]
            if speakers != ["Assistant"]:
                raise ValueError(
                    f"field '{self._field(name)}' continues beyond one answer (after the turns of both sides:"
                    f" {', '.join(speakers)})"
                )
            answers.append(turns[-1][1])
            if not answers[-1].strip():
                raise ValueError(f"field '{self._field(name)}' is empty after the last '\\n\\nAssistant:'")
        if self.as_chat:
            prompt = [{"role": SPEAKERS[speaker.lower()], "content": text.strip()} for speaker, text in shared]
            return self._pair(row, prompt, *(answer.strip() for answer in answers))
        turns = "".join(f"\n\n{speaker}:{text}" for speaker, text in shared)
        return self._pair(row, f"{turns}\n\nAssistant:", *answers)

    def _rated(self, row: Mapping[str, Any]) -> list[Pair]:
        prompt = self._text(row, "prompt")
        rated = self._responses(row)
        if len(rated) < 2:
            raise NoPair("fewer than two responses")
        order = range(len(rated))
        best = max(order, key=lambda i: rated[i][1])
        if self.pick is Pick.best_worst:
            pairs = [(best, min(order, key=lambda i: rated[i][1]))]
        elif self.pick is Pick.best_rest:
            pairs = [(best, i) for i in order if i != best]
        else:
            pairs = [(i, j) if rated[i][1] > rated[j][1] else (j, i) for i, j in combinations(order, 2)]
        pairs = [(rated[i], rated[j]) for i, j in pairs if rated[i][1] > rated[j][1]]
        if not pairs:
            raise NoPair("tied ratings")
        pairs = [(better, worse) for better, worse in pairs if better[0] != worse[0]]
        if not pairs:
            raise NoPair("identical sides")
        return [
            replace(self._pair(row, prompt, better[0], worse[0]), score_margin=better[1] - worse[1])
            for better, worse in pairs
        ]

    def _responses(self, row: Mapping[str, Any]) -> list[tuple[str, float]]:
        """The rated responses, each with its rating."""
        responses, where = self._get(row, "responses"), self._field("responses")
        if not isinstance(responses, list):
            raise ValueError(f"field '{where}' is {type(responses).__name__}, not a list")
        inside = "ratings" not in self.columns and "ratings" not in row and all(isinstance(r, dict) for r in responses)
        if inside:
            ratings_where, ratings = where, [_first(r, RESPONSE_RATING, where) for r in responses]
        else:
            ratings_where, ratings = self._field("ratings"), self._get(row, "ratings")
        if not isinstance(ratings, list) or len(ratings) != len(responses):
            amount = len(ratings) if isinstance(ratings, list) else type(ratings).__name__
            raise ValueError(f"field '{ratings_where}' holds {amount} for {len(responses)} responses")
        rated = []
        for response, rating in zip(responses, (_number(r, ratings_where) for r in ratings), strict=True):
            if math.isnan(rating):
                continue
            text = _first(response, RESPONSE_TEXT, where) if isinstance(response, dict) else response
            if not isinstance(text, str):
                raise ValueError(f"field '{where}' holds a response that is {type(text).__name__}, not a string")
            if not text.strip():
                raise ValueError(f"field '{where}' holds an empty response")
            rated.append((_readable(text, where), rating))
        return rated

    def _pair(self, row: Mapping[str, Any], prompt: Text, chosen: Text, rejected: Text) -> Pair:
        """The pair as text where all is text, else as chat; messages that both sides begin with belong to the prompt."""
        system, tools = self._system(row), self._tools(row)
        if all(isinstance(text, str) for text in (prompt, chosen, rejected)) and not self.as_chat:
            for name, value in (("system", system), ("tools", tools)):
                if value:
                    raise ValueError(
                        f"field '{self._field(name)}' has no place in plain text; type data.as_chat=true for messages"
                    )
            return Pair(prompt, chosen, rejected)
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in (chosen, rejected)]
        shared = _shared(*sides)
        messages = _joined(given, sides[0][:shared])
        if not messages:
            raise ValueError("field 'prompt' is missing, or empty, and both sides share no first message")
        if system.strip() and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            roles = [message["role"] for message in side[shared:]]
            if roles != ["assistant"]:
                raise ValueError(
                    f"field '{self._field(name)}' holds {len(roles)} messages after the prompt (roles"
                    f" {', '.join(roles)}): only one answer of the assistant can be scored"
                )
            if not (side[-1].get("content", "").strip() or side[-1].get("tool_calls")):
                raise ValueError(f"field '{self._field(name)}' is empty")
        return Pair(messages, sides[0][shared:], sides[1][shared:], tools=tools)


def shared_words(a: str, b: str) -> int:
    """How many first characters of both are the prompt that neither row states: the longest common run of whole words.

    The cut lies where both go on with whitespace, which stays with the responses, and leaves both something to say. It is
    made in characters: a common run of tokens would depend on the tokenizer, and could end inside a word that only one of
    the sides has, whose remainder no prompt and response encoded apart would give.

    >>> shared_words("The sky is blue.", "The sky is blurred.")
    10
    """
    longest = min(len(os.path.commonprefix([a, b])), len(a.rstrip()) - 1, len(b.rstrip()) - 1)
    ends = (i for i in range(longest, 0, -1) if a[i].isspace() and b[i].isspace() and not a[i - 1].isspace())
    return next(ends, 0)


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first items both share, the last of each left out."""
    count = 0
    while count < min(len(a), len(b)) - 1 and a[count] == b[count]:
        count += 1
    return count


def _joined(given: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt's messages and then those that both sides begin with, without saying the prompt twice."""

    def said(messages: list[Message]) -> list[tuple[str, str]]:
        return [(message["role"], message.get("content", "").strip()) for message in messages]

    if shared and shared[0]["role"] != "assistant":  # a conversation from its start, which may hold the prompt
        for i in range(len(shared) - len(given) + 1):
            if said(shared[i : i + len(given)]) == said(given):
                return shared
    overlap = min(len(given), len(shared))
    while said(given[len(given) - overlap :]) != said(shared[:overlap]):
        overlap -= 1
    return given + shared[overlap:]


def _messages(value: list[Any] | dict[str, Any], where: str) -> list[Message]:
    return [_message(item, where) for item in (value if isinstance(value, list) else [value])]


def _message(value: Any, where: str) -> Message:
    """One message with a role, and a string as its content unless it calls tools; ShareGPT's names are translated."""
    if not isinstance(value, dict):
        raise ValueError(f"field '{where}' holds {type(value).__name__} where a message should be")
    message = _readable(value, where)
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if speaker not in list(SPEAKERS):
            raise ValueError(f"field '{where}' has a message from {speaker!r}, not from one of {', '.join(SPEAKERS)}")
        message = {"role": SPEAKERS[speaker], "content": message.pop("value", ""), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"field '{where}' has a message without a role (it {_content(message)})")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"field '{where}' has a message whose content is {type(content).__name__}, not a string")
    return message


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"field '{where}' has a content part of type '{kind}': only text is supported")
    return part["text"]


def _readable(value: Any, where: str) -> Any:
    """The value without its None entries (Arrow fills absent keys with them), every string in it checked."""
    if isinstance(value, str) and (bad := UNREADABLE.search(value)):
        what = "NUL character" if bad[0] == "\0" else "lone surrogate"
        raise ValueError(f"field '{where}' has a {what} at position {bad.start()}")
    if isinstance(value, list):
        return [_readable(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _readable(item, where) for key, item in value.items() if item is not None}
    return value


def _number(value: Any, where: str) -> float:
    """A number, or one in writing; NaN for None."""
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number) or isinstance(value, bool):
        raise ValueError(f"field '{where}' has {value!r} where a number should be")
    return number


def _first(item: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in item:
            return item[name]
    raise ValueError(f"field '{where}' holds a response without {', '.join(names)} (it {_content(item)})")


def _content(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"has {', '.join(map(repr, value)) or 'none'}"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {type(value).__name__}"
