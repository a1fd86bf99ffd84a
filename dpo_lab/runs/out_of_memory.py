"""Out of memory, on a GPU or in the host's memory, as an error of one line that names the settings to lower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_lab.runs.run_record import RunFailed

_TEXT = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_SIZE = re.compile(r"tried to allocate (\d[\d.]* \w+)", re.IGNORECASE)


class OutOfMemory(RunFailed):
    """Raised where memory did not suffice; the message names the settings to lower."""


@contextmanager
def explain_out_of_memory(where: str, *settings: str) -> Iterator[None]:
    """Raise OutOfMemory, with the settings to type, for an allocation that fails inside the context.

    where: what failed, for the message. torch raises RuntimeError, and OutOfMemoryError, a subclass, on a GPU; numpy
    raises MemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not _TEXT.search(str(error)):
            raise
        found = _SIZE.search(str(error))
        size = f" (tried to allocate {found[1]})" if found else ""
        advice = f"; type {', or '.join(settings)}" if settings else ""
        raise OutOfMemory(f"out of memory in {where}{size}{advice}") from error


def halved(key: str, value: int) -> list[str]:
    """Return what to type for half the value of a setting, in a list that is empty if it can't be less."""
    return [f"{key}={value // 2}"] if value > 1 else []
