"""Signals that ask a process to stop: raised as one exception, or kept as a request that the training loop honours
between steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the signals that ask a process to stop
# By which a scheduler announces the end of a job; used only if the scheduler has installed a handler.
REQUEUE = signal.SIGUSR2
TIME_IS_UP = signal.SIGALRM  # stands for the run's own time limit, for its number and exit code; it is never sent
STATUS = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted", TIME_IS_UP: "stopped"}


class StopSignal(BaseException):
    """The process was asked to stop.

    By a scheduler (SIGTERM, status `preempted`), at the keyboard (SIGINT, `interrupted`), or by the run's own time
    limit (TIME_IS_UP, `stopped`).
    """

    def __init__(self, signum: int) -> None:
        super().__init__("trainer.max_time" if signum == TIME_IS_UP else signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> str:
        return STATUS.get(signal.Signals(self.signum), "preempted")

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def stopped_by(code: int) -> StopSignal | None:
    """Return the StopSignal of an exit code, 128 + n or -n (killed by signal n); None if it is not that of a stop."""
    signum = -code if code < 0 else code - 128
    return StopSignal(signum) if signum in STATUS else None


def raise_on_signals(tell: Callable[[StopSignal], None] = lambda stopped: None) -> None:
    """Make SIGTERM and SIGINT raise StopSignal in the main thread, after calling `tell` with it."""

    def stop(signum: int, frame: FrameType | None) -> None:
        # Ignore further ones, so that a write in progress is not interrupted.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopped = StopSignal(signum)
        tell(stopped)
        raise stopped

    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)


@contextmanager
def reraise_stop() -> Iterator[None]:
    """Inside the context, raise an error that a StopSignal caused, say in a library's clean-up, as that StopSignal.

    Except for OSError, since a disk that is full while a checkpoint is saved has to be reported.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and not isinstance(link, (OSError, StopSignal)):
            link = link.__context__
        if isinstance(link, StopSignal):
            raise StopSignal(link.signum) from None
        raise


def end_on_signals() -> None:
    """Restore the default of SIGTERM and SIGINT: they end this process silently, since its work is done."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


class StopRequest:
    """A context that records a stop signal in `signum` (None: no signal yet) instead of raising it.

    The training loop checks it between two steps, saves, then calls `raise_or_requeue`. A second SIGINT raises
    StopSignal at once, for a user who does not want to wait. Outside of the main thread, which receives no signals, it
    does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            requeue = signal.getsignal(REQUEUE)
            handled = (*STOP_SIGNALS, REQUEUE) if callable(requeue) else STOP_SIGNALS
            self._before = {signum: signal.getsignal(signum) for signum in handled}
            self.listen()
        return self

    def listen(self) -> None:
        """Install the signal handlers, again if a library has replaced them inside the context."""
        for signum in self._before:
            signal.signal(signum, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def ask(self, signum: int) -> None:
        """Record a stop that this process requests itself, unless a signal was recorded before."""
        if self.signum is None:
            self.signum = signum

    def raise_or_requeue(self, signum: int) -> None:
        """Stop for `signum`, a signal sent to this process or to another one of the same run.

        Calls the scheduler's handler for REQUEUE, which requeues the job and exits; raises StopSignal for other
        signals.
        """
        if signum == REQUEUE:
            handler: Callable[[int, FrameType | None], Any] | None = self._before.get(REQUEUE)
            if handler is not None:
                handler(signum, None)
        if signal.SIGTERM in self._before:
            self._before[signal.SIGTERM] = signal.SIG_IGN  # as in raise_on_signals
        raise StopSignal(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise StopSignal(signum)
        if signum == signal.SIGTERM and REQUEUE in self._before:
            signum = REQUEUE  # a scheduler that preempts sends both signals, and the job has to be requeued
        self.ask(signum)
