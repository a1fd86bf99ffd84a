"""Errors in one line: their base class, the first line of a library's error, and that of a number that is too small."""

from __future__ import annotations

import math


class LabError(Exception):
    """The base class of errors that name what is wrong and what to do, in one line: that which the commands print."""


def first_line(error: BaseException | str | None) -> str:
    """Return the first line of an error's message that is not empty; without one, the name of the error's type."""
    lines = ("" if error is None else str(error)).splitlines()
    default = type(error).__name__ if isinstance(error, BaseException) else ""
    return next((line.strip() for line in lines if line.strip()), default)


def check_at_least(key: str, value: float, least: float, example: object) -> None:
    """Raise ValueError, with what to type, unless the value of the setting `key` is finite and `least` or more."""
    if not least <= value < math.inf:
        raise ValueError(f"{key}={value}: must be {least} or more; type e.g. {key}={example}")
