"""Parse dialogues written as one text, "\\n\\nHuman: ...\\n\\nAssistant: ...", into turns."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dpo_lab.core.pairs import Text
from dpo_lab.data.labels import EmptyResponse
from dpo_lab.data.messages import MOST, field_error, shared

TURN = re.compile(r"\n\n(Human|Assistant):")

Turn = tuple[str, str]  # speaker, text


def parted(texts: Mapping[str, Text]) -> tuple[list[Turn], list[str]]:
    """Return the turns that two dialogues share, and the one answer after them of each.

    texts: the dialogues by field name. Raises ValueError, naming the field, if a dialogue does not end with one answer.
    """
    sides: list[list[Turn]] = []
    for where, text in texts.items():
        if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
            raise field_error(where, r"is not a transcript: it must begin with '\n\nHuman:'")
        _, *parts = TURN.split(text)
        sides.append(list(zip(parts[::2], parts[1::2], strict=True)))
    turns = sides[0][: shared(*sides)]
    for where, side in zip(texts, sides, strict=True):
        speakers = [speaker for speaker, _ in side[len(turns) :]]
        if speakers != ["Assistant"]:
            what = f"after the turns of both sides: {', '.join(speakers[:MOST])}"
            raise field_error(where, f"continues beyond one answer ({what})")
        if not side[-1][1].strip():
            raise EmptyResponse(rf"field '{where}' is empty after the last '\n\nAssistant:'")
    return turns, [side[-1][1] for side in sides]
