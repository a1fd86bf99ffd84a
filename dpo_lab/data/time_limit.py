"""A time limit on code written by others that we run: a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STUCK = 4  # times the limit, in CPU time: where Python gets no turn meanwhile, the system ends the process


class TimeLimitExceeded(Exception):
    """It took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp inside, once so much time has passed. Costs microseconds; only a process's main thread can be
    told.

    A single operation of Python's own that does not end (a power of huge numbers) can't be interrupted: the process is
    ended by SIGPROF then, whose default is to end it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was = signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, STUCK * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, was)


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeLimitExceeded
