"""Signals that ask a process to stop: raised as one exception, or kept as a request that the training loop honours
between steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # what asks a process to stop
REQUEUE = signal.SIGUSR2  # what a scheduler announces the end of a job with; heeded where it has a handler of its own
TIME_IS_UP = signal.SIGALRM  # a run's own time limit: lends it its number and exit code, and is never sent
STATUS = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted", TIME_IS_UP: "stopped"}


class StopSignal(BaseException):
    """The process was asked to stop: by a scheduler (SIGTERM, `preempted`), at the keyboard (SIGINT, `interrupted`), or by the
    run's own time limit (TIME_IS_UP, `stopped`).
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
    """What a process was stopped by that ended with this exit code, 128 + n or, where it took no notice, -n; else None."""
    signum = -code if code < 0 else code - 128
    return StopSignal(signum) if signum in STATUS else None


def raise_on_signals(tell: Callable[[StopSignal], None] = lambda stopped: None) -> None:
    """From now on SIGTERM and SIGINT raise StopSignal in this process's main thread, after `tell` was called with it."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what is still written is not to be cut short
        stopped = StopSignal(signum)
        tell(stopped)
        raise stopped

    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)


@contextmanager
def reraise_stop() -> Iterator[None]:
    """Inside it an error that came of a StopSignal is that StopSignal: a library that tidies up what was cut short may stumble.

    But for errors of the operating system: a disk that is full while work is put in safety is news.
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
    """From now on SIGTERM and SIGINT end this process without a word: its work is done, and all that is left is its exit."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


class StopRequest:
    """A context in which a signal is noted and not obeyed: `signum` says which one came, None so far.

    The one who opened it looks between two steps, puts its work in safety, then calls `obey`. A second SIGINT raises
    StopSignal at once: someone at the keyboard has lost patience. Outside the main thread, where no signal arrives, it notes
    nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            requeue = signal.getsignal(REQUEUE)
            heeded = (*STOP_SIGNALS, REQUEUE) if callable(requeue) else STOP_SIGNALS
            self._before = {signum: signal.getsignal(signum) for signum in heeded}
            self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, once more where a library took them over inside the context."""
        for signum in self._before:
            signal.signal(signum, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def ask(self, signum: int) -> None:
        """Note a request of this process's own, unless one came already."""
        if self.signum is None:
            self.signum = signum

    def obey(self, signum: int) -> None:
        """Stop for `signum`, which this process or another one of the same run was sent.

        Hands REQUEUE to the scheduler's own handler, which puts the job back into its queue and leaves; else raises StopSignal.
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
            signum = REQUEUE  # a scheduler that pre-empts says both: what counts is that the job comes back
        self.ask(signum)
