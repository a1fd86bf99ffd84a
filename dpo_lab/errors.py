"""Errors in one line: the first line of a library's error."""

from __future__ import annotations


def first_line(error: BaseException | str | None) -> str:
    """Return the first line of an error's message that is not empty; without one, the name of the error's type."""
    text, default = (
        ("" if error is None else str(error)),
        type(error).__name__ if isinstance(error, BaseException) else "",
    )
    return next((line.strip() for line in text.splitlines() if line.strip()), default)
