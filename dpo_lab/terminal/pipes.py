"""End a command without a traceback if the reader of its output, as `head`, has closed the pipe."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_if_closed() -> Iterator[None]:
    """Leave the context or the decorated function, which then returns None, once the reader of standard output is gone.

    What is left in the buffer of standard output is written at the end.
    """
    try:
        yield
    except BrokenPipeError as error:
        _discard_output(error)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError as error:
            _discard_output(error)


def explain_closed(error: Exception) -> str | None:
    """Return one line about an error that comes from a closed standard output; None for other errors."""
    if isinstance(error, BrokenPipeError) and _is_closed():
        return "standard output: its reader closed it before the end, as head does"
    return None


def _discard_output(error: BrokenPipeError) -> None:
    """Discard what else is written to standard output, also at exit. Raise the error if it comes from elsewhere."""
    if not _is_closed():
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_closed() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # replaced by something that is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
