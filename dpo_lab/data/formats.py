"""Recognise the format of a row and read it as a pair, or as one labelled response; for fine-tuning also plain text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from dpo_lab.core.pairs import Pair, Text, messages_before_answer
from dpo_lab.data.json_text import read_json_text
from dpo_lab.data.labels import EmptyResponse, Label, NoPair, is_desirable, prefers_second
from dpo_lab.data.media import check_media
from dpo_lab.data.messages import (
    MOST,
    describe,
    field_error,
    first,
    merge_messages,
    message,
    number,
    readable,
    shared_messages,
    shared_words,
    show_role,
)
from dpo_lab.data.ratings import Pick, pairs_of
from dpo_lab.data.transcript import parted

Row = Mapping[str, Any]
SIDES = ("chosen", "rejected")
NAMES = "completion system tools responses ratings label text"
COLUMNS = ["prompt", *SIDES, *NAMES.split(), *(f"score_{side}" for side in SIDES)]
ARENA = (("conversation_a", "conversation_b"), ("response_a", "response_b"))
SCORES = {side: (f"score_{side}", f"{side}_score", f"{side}-rating", f"{side}_rating") for side in SIDES}
RESPONSE_TEXT, RESPONSE_RATING = ("content", "text", "response"), ("rating", "score", "overall_score")
REQUIRED: Any = object()


class Format(str, Enum):
    """The format of a row; auto recognises it from the row's fields."""

    auto = "auto"
    preference = "preference"  # prompt, chosen, rejected: text or chat; the prompt may be what both begin with
    transcript = "transcript"  # chosen, rejected: complete dialogues "\n\nHuman: ...\n\nAssistant: ..."
    ratings = "ratings"  # prompt, responses, ratings
    arena = "arena"  # conversation_a, conversation_b, winner; or prompt, response_a, response_b, winner
    unpaired = "unpaired"  # prompt, completion, label: one response, desirable or not
    prompt = "prompt"  # prompt alone, for methods that sample
    text = "text"  # text without a prompt, for supervised fine-tuning only


@dataclass
class Shape:
    """How the rows of a source are read as pairs.

    columns: name here -> name in the rows, or a dotted path to a nested value (`summaries.0.text`). `system`, `tools`
    and scores are found by their usual names too; the label of a pair is read only if `columns` names it, since it may
    swap the pair; that of an arena's row, or of a single response, is found by its usual name too. pick: which pairs to
    form of rated responses; label_is: the meaning of a label. as_chat: plain strings become messages, the prompt one of
    the user (after `system`, if the row has one) and each response one of the assistant.
    """

    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)
    pick: Pick = Pick.best_worst
    label_is: Label = Label.first
    as_chat: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            raise ValueError(f"data.columns.{unknown[0]}: no such column; type one of {', '.join(COLUMNS)}")

    def read(self, row: Row, counts: Counter[str] | None = None) -> list[Pair]:
        """Return all pairs of a row and count its faults in `counts`, see row_faults.py.

        Raises ValueError, naming the field, for a bad row, and NoPair for a row without a preference.
        """
        counts = Counter() if counts is None else counts
        if self.format is Format.text:
            return [self._text_row(row)]
        shape = self._resolved(row)
        pairs = shape._pairs(shape._parsed(row, counts))
        check_media(row, {shape._column(name) for name in COLUMNS}, pairs, counts)
        return pairs

    def _resolved(self, row: Row) -> Shape:
        """Return the shape with the format of the row, and with the columns that hold its responses and its label."""
        kind = self._recognise(row) if self.format is Format.auto else self.format
        columns: dict[Any, str] = {}
        if kind is Format.unpaired:
            columns = dict.fromkeys(SIDES, self._column("completion")) | {"label": "label"}
        elif kind is Format.arena:
            columns = dict(zip(SIDES, next((names for names in ARENA if names[0] in row), ARENA[0]), strict=True))
            columns["label"] = "winner"
        return Shape(kind, columns | self.columns, self.pick, self.label_is, self.as_chat)

    def _pairs(self, row: Row) -> list[Pair]:
        if self.format is Format.ratings:
            return self._rated(row)
        if self.format is Format.unpaired:
            return [self._unpaired(row)]
        if self.format is Format.prompt:
            pair = self._pair(row, self._text(row, "prompt"), "a", "b")
            return [replace(pair, is_single=True, **dict.fromkeys(SIDES, [] if pair.is_chat else ""))]
        second_is_better = self._second_is_better(row)  # first: a tie need not hold a pair
        pair = self._transcript(row) if self.format is Format.transcript else self._preference(row)
        pair = replace(pair, score_margin=self._score(row, "chosen") - self._score(row, "rejected"))
        if second_is_better:
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen, score_margin=-pair.score_margin)
        if pair.chosen == pair.rejected:
            raise NoPair("identical sides")
        return [pair]

    def _parsed(self, row: Row, counts: Counter[str]) -> Row:
        """Return the row with JSON text of messages and tools replaced by what it stores."""
        parsed = read_json_text({name: self._get(row, name, None) for name in ("prompt", *SIDES)}, counts)
        if "tools" in parsed and self._tools(row):
            del parsed["tools"]
        return {**row, **{self._column(name): value for name, value in parsed.items()}} if parsed else row

    def _recognise(self, row: Row) -> Format:
        if not self._has(row, "chosen"):
            if self._has(row, "responses"):
                return Format.ratings
            if self._has(row, "completion"):
                return Format.unpaired
            if "winner" in row and any(first in row and second in row for first, second in ARENA):
                return Format.arena
            if {"prompt"} <= set(row) <= {"prompt", "system", "tools"}:
                return Format.prompt
        sides = [self._get(row, name, None) for name in SIDES]
        if all(isinstance(s, str) and s.startswith("\n\nHuman:") and "\n\nAssistant:" in s for s in sides):
            return Format.transcript
        return Format.preference

    def _preference(self, row: Row) -> Pair:
        chosen, rejected = self._text(row, "chosen"), self._text(row, "rejected")
        if self._has(row, "prompt"):
            return self._pair(row, self._text(row, "prompt"), chosen, rejected)
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            return self._pair(row, [], chosen, rejected)
        if chosen == rejected:
            raise NoPair("identical sides")
        length = shared_words(chosen, rejected)
        if not length:
            raise ValueError(f"field 'prompt' is missing and both sides share no first word (the row {describe(row)})")
        sides = [side[length:].lstrip() if self.as_chat else side[length:] for side in (chosen, rejected)]
        return self._pair(row, chosen[:length], *sides)

    def _unpaired(self, row: Row) -> Pair:
        """Read one response as a pair whose other side is empty: rejected if it is desirable, else chosen."""
        label = is_desirable(self._get(row, "label"), self._column("label"))
        completion = self._text(row, "chosen")
        is_dialogue = not (isinstance(completion, str) or self._has(row, "prompt"))  # its last message is the response
        pair = self._pair(row, [] if is_dialogue else self._text(row, "prompt"), completion, completion)
        return replace(pair, is_single=True, **{"rejected" if label else "chosen": [] if pair.is_chat else ""})

    def _transcript(self, row: Row) -> Pair:
        texts = {self._column(name): self._text(row, name) for name in SIDES}
        turns, answers = parted(texts)
        if self.as_chat:
            names = {"Human": "user", "Assistant": "assistant"}
            prompt = [{"role": names[speaker], "content": text.strip()} for speaker, text in turns]
            return self._pair(row, prompt, *(answer.strip() for answer in answers))
        dialogue = "".join(f"\n\n{speaker}:{text}" for speaker, text in turns)
        return self._pair(row, f"{dialogue}\n\nAssistant:", *answers)

    def _rated(self, row: Row) -> list[Pair]:
        prompt, pairs = self._text(row, "prompt"), pairs_of(self._responses(row), self.pick)
        return [replace(self._pair(row, prompt, a, b), score_margin=high - low) for (a, high), (b, low) in pairs]

    def _text_row(self, row: Row) -> Pair:
        text, where = self._get(row, "text"), self._column("text")
        if not isinstance(text, str):
            raise field_error(where, f"is {type(text).__name__}, not a string")
        if not text.strip():
            raise field_error(where, "is empty")
        return Pair("", readable(text, where), "", is_single=True)

    def _responses(self, row: Row) -> list[tuple[str, float]]:
        """Return the responses that have a rating, with their rating."""
        responses, where = self._get(row, "responses"), self._column("responses")
        if not isinstance(responses, list):
            raise field_error(where, f"is {type(responses).__name__}, not a list")
        if not self._has(row, "ratings") and all(isinstance(response, dict) for response in responses):
            source, ratings = where, [first(response, RESPONSE_RATING, where) for response in responses]
        else:
            source, ratings = self._column("ratings"), self._get(row, "ratings")
        if not isinstance(ratings, list) or len(ratings) != len(responses):
            amount = len(ratings) if isinstance(ratings, list) else type(ratings).__name__
            raise field_error(source, f"holds {amount} for {len(responses)} responses")
        rated = []
        for response, rating in zip(responses, [number(rating, source) for rating in ratings], strict=True):
            text = first(response, RESPONSE_TEXT, where) if isinstance(response, dict) else response
            if math.isnan(rating):
                continue
            if not isinstance(text, str):
                raise field_error(where, f"holds a response that is {type(text).__name__}, not a string")
            if not text.strip():
                raise EmptyResponse(f"field '{where}' holds an empty response")
            rated.append((readable(text, where), rating))
        return rated

    def _pair(self, row: Row, prompt: Text, chosen: Text, rejected: Text) -> Pair:
        """Build a pair of text if all is text, else of chat; shared first messages belong to the prompt."""
        system, tools = self._system(row), self._tools(row)
        if not self.as_chat and all(isinstance(text, str) for text in (prompt, chosen, rejected)):
            for name, value in (("system", system), ("tools", tools)):
                if value:
                    what = "can't be used with plain text; type data.as_chat=true for messages"
                    raise field_error(self._column(name), what)
            return Pair(prompt, chosen, rejected)
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in (chosen, rejected)]
        # one response after a prompt begins where the user has spoken last
        common = messages_before_answer(sides[0][:-1]) if chosen is rejected and given else shared_messages(*sides)
        messages = merge_messages(given, sides[0][:common])
        if not messages:
            what = f"is missing, or empty, and both sides share no first message (the row {describe(row)})"
            raise field_error("prompt", what)
        if system and all(turn["role"] != "system" for turn in messages):
            messages = [{"role": "system", "content": system}, *messages]
        for name, side in zip(SIDES, sides, strict=True):
            roles = [show_role(turn["role"]) for turn in side[common:]]
            if roles[:1] != ["assistant"] or roles[-1] != "assistant":
                what = f"holds {len(roles)} messages after the prompt (roles {', '.join(roles[:MOST])})"
                raise field_error(self._column(name), f"{what}: a response must begin and end with the assistant")
            if not (side[-1].get("content", "").strip() or side[-1].get("tool_calls")):
                raise EmptyResponse(f"field '{self._column(name)}' is empty")
        return Pair(messages, sides[0][common:], sides[1][common:], tools=tools)

    def _column(self, name: str) -> str:
        return self.columns.get(name, name)

    def _has(self, row: Row, name: str) -> bool:
        return name in self.columns or name in row

    def _get(self, row: Row, name: str, default: Any = REQUIRED) -> Any:
        """Return the value of a column; `default`, if given, if it is missing and `columns` does not name it."""
        path = self._column(name)
        if path in row:
            return row[path]
        if name not in self.columns and default is not REQUIRED:
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
                raise field_error(".".join(steps[: i + 1]), f"is missing ({owner} {describe(value)})")
        return value

    def _text(self, row: Row, name: str) -> Text:
        """Return a prompt or a response of the row, checked; a response must not be empty."""
        value, where = self._get(row, name), self._column(name)
        if not isinstance(value, str | list | dict):
            raise field_error(where, f"is {type(value).__name__}, not a string or a list of messages")
        if isinstance(value, str):
            text: Text = readable(value, where)
        else:
            text = [message(item, where) for item in (value if isinstance(value, list) else [value])]
        if name in SIDES and not (text.strip() if isinstance(text, str) else text):
            raise EmptyResponse(f"field '{where}' is empty")
        return text

    def _system(self, row: Row) -> str:
        system, where = self._get(row, "system", None) or "", self._column("system")
        if not isinstance(system, str):
            raise field_error(where, f"is {type(system).__name__}, not a string")
        return readable(system, where) if system.strip() else ""

    def _tools(self, row: Row) -> list[dict[str, Any]] | None:
        tools, where = self._get(row, "tools", None) or [], self._column("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) or []
            except json.JSONDecodeError as error:
                raise field_error(where, f"is not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise field_error(where, "is not a list of objects, or the JSON of one")
        return readable(tools, where) or None

    def _score(self, row: Row, side: str) -> float:
        if (name := f"score_{side}") in self.columns:
            return number(self._get(row, name), self._column(name))
        return next((number(row[key], key) for key in SCORES[side] if key in row), math.nan)

    def _second_is_better(self, row: Row) -> bool:
        """Return whether the label prefers the response in the column `rejected`."""
        if "label" not in self.columns:
            return False
        return prefers_second(self._get(row, "label"), self._column("label"), self.label_is)
