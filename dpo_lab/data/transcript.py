"""Parse dialogues written as one text, "\\n\\nHuman: ...\\n\\nAssistant: ...", into turns."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dpo_lab.core.pairs import Text
from dpo_lab.data.messages import MOST, field_error, shared

TURN = re.compile(r"\n\n(Human|Assistant):")

Turn = tuple[str, str]  # who speaks, what they say


def parted(texts: Mapping[str, Text]) -> tuple[list[Turn], list[str]]:
    """The turns that two dialogues share, and the one answer after them of each.

    texts: both by the names of their fields, which errors show. Raises ValueError where one goes on otherwise.
    """
    sides: list[list[Turn]] = []
    for where, text in texts.items():
        if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
            raise field_error(where, r"is no transcript: it must begin with '\n\nHuman:'")
        _, *parts = TURN.split(text)
        sides.append(list(zip(parts[::2], parts[1::2], strict=True)))
    turns = sides[0][: shared(*sides)]
    for where, side in zip(texts, sides, strict=True):
        speakers = [speaker for speaker, _ in side[len(turns) :]]
        if speakers != ["Assistant"]:
            what = f"after the turns of both sides: {', '.join(speakers[:MOST])}"
            raise field_error(where, f"continues beyond one answer ({what})")
        if not side[-1][1].strip():
            raise field_error(where, r"is empty after the last '\n\nAssistant:'")
    return turns, [side[-1][1] for side in sides]
