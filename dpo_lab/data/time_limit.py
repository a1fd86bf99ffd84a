"""A time limit on code written by others that we run: a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STUCK = 4  # multiple of the limit, in CPU time, after which the system ends a process that can't be interrupted


class TimeLimitExceeded(Exception):
    """Raised where code took longer than its limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in the block after `seconds`. It costs microseconds and has no effect outside of the main
    thread.

    A single operation of the interpreter that takes forever (a power of huge numbers) can't be interrupted; then
    SIGPROF, whose default action is to terminate, ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, STUCK * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, previous)


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeLimitExceeded
