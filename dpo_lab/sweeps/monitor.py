"""Monitor a running sweep: one line per finished job, and a progress bar on a terminal."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_lab.distributed.signals import StopRequest
from dpo_lab.sweeps.job_status import JobStatusStore, tail
from dpo_lab.sweeps.summary import Outcome, duration

TICK = 0.5  # seconds between two reads of the jobs' status


class ProgressMonitor:
    """A thread that polls the status of the jobs while a launcher runs in the main thread.

    look: returns the outcomes of all jobs so far; changed(outcomes): called when a job has ended. When `request` holds
    a signal, the jobs are asked once, through `store`, to stop.
    """

    def __init__(
        self,
        console: Console,
        store: JobStatusStore,
        look: Callable[[], list[Outcome]],
        changed: Callable[[Sequence[Outcome]], None],
        request: StopRequest,
    ) -> None:
        self._console, self._store, self._look, self._changed, self._request = console, store, look, changed, request
        self._reported = {id(o.job) for o in look() if o.status == "done"}
        self._most_at_once = 1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressMonitor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        forwarded = False
        with self._live() as live:
            while True:
                over = self._over.wait(TICK / 5 if self._request.signum and not forwarded else TICK)
                if self._request.signum is not None and not forwarded:
                    forwarded = True
                    self._store.ask_to_stop(self._request.signum)
                    self._console.print("Stopping: running jobs save and end. The same command resumes them.")
                outcomes = self._look()
                self._report(outcomes)
                if live is not None:
                    live.update(self._view(outcomes), refresh=True)
                if over:
                    return

    def _report(self, outcomes: Sequence[Outcome]) -> None:
        ended = [o for o in outcomes if id(o.job) not in self._reported and o.status not in ("not started", "running")]
        for outcome in ended:
            self._reported.add(id(outcome.job))
            why = f": {outcome.error}" if outcome.error else ""
            count = f"[{len(self._reported)}/{len(outcomes)}]"
            line = f"{count} {outcome.word}  {outcome.job.title}  {duration(outcome.seconds)}{why}"
            self._console.print(line, soft_wrap=True)
        if ended:
            self._changed(outcomes)

    @contextmanager
    def _live(self) -> Iterator[Live | None]:
        if not self._console.is_terminal:
            yield None
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            yield live

    def _view(self, outcomes: Sequence[Outcome]) -> Group:
        running = [o for o in outcomes if o.status == "running"]
        self._most_at_once = max(self._most_at_once, len(running))
        done, failed = (sum(o.status == status for o in outcomes) for status in ("done", "failed"))
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"jobs {done}/{len(outcomes)}"),
            ProgressBar(total=len(outcomes), completed=done + failed, width=30),
            Text(f"{failed} failed" if failed else "", style="red"),
            Text(time_left(outcomes, self._most_at_once), style="dim"),
        )
        lines = [Text(f"  {o.job.title}  {_stage(o.job.folder)}", style="dim") for o in running]
        return Group(bar, *lines)


def time_left(outcomes: Sequence[Outcome], at_once: int) -> str:
    """Return the estimated time left, from the mean time of finished jobs; an empty text before the first."""
    took = [o.seconds for o in outcomes if o.seconds is not None and o.status == "done"]
    left = sum(o.status in ("not started", "running") for o in outcomes)
    if not took or not left:
        return ""
    return f"about {duration(left * sum(took) / len(took) / at_once)} left"


def _stage(folder: Path) -> str:
    """Return the last step in a running job's metrics log; an empty text before the first."""
    for line in reversed(tail(folder / "metrics.jsonl")):
        try:
            return f"step {json.loads(line)['step']}"
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be incomplete
    return ""
