"""Labels of rows: which of two responses is preferred, or that they tie, and whether a single response is desirable."""

from __future__ import annotations

from enum import Enum
from typing import Any

from dpo_lab.data.messages import field_error, shorten

NAMES = {"model_a": False, "model_b": True}  # of arenas, by whether the second response is preferred
TIES = {"2", "tie", "tie (bothbad)", "both_bad", "bothbad"}
DESIRABLE = {"1": True, "true": True, "0": False, "false": False}


class Label(Enum):
    """The meaning of a label of 1 for two unordered responses. (Not a str enum: str has a method `index`.)"""

    first = "first"  # the first is preferred (0: the second)
    index = "index"  # the one with index 1, the second, is preferred (0: the first)


class NoPair(Exception):
    """Raised for a well-formed row without a preference; the message is the reason, which is counted."""


class EmptyResponse(ValueError):
    """Raised for a row with an empty response; where bad rows are skipped, such rows are counted by this reason."""


def prefers_second(label: Any, where: str, label_is: Label) -> bool:
    """Return whether a label prefers the second of two responses; raise NoPair for a tie, ValueError for another label."""
    text = _text(label)
    if text in TIES:
        raise NoPair("tie")
    if text in NAMES:
        return NAMES[text]
    if text not in ("0", "1"):
        raise field_error(where, f"is {shorten(label)}, not 0 or 1, model_a or model_b, nor a tie (2 or tie)")
    return int(text) == (1 if label_is is Label.index else 0)


def is_desirable(label: Any, where: str) -> bool:
    """Return whether a label says that a response is desirable; raise ValueError for a label that says neither."""
    try:
        return DESIRABLE[_text(label)]
    except KeyError:
        raise field_error(where, f"is {shorten(label)}, not true or false, 1 or 0") from None


def _text(label: Any) -> str:
    """Return a label in lower case, numbers and booleans as text: 1, 1.0, True and " 1" are labels of 1."""
    if isinstance(label, bool | int | float) and label in (0, 1, 2):
        return str(int(label))
    return label.strip().lower() if isinstance(label, str) else ""
