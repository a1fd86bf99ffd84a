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

TICK = 0.5  # seconds between two looks at the cells


class ProgressMonitor:
    """A thread that looks at the cells' notes while a launcher, of whatever kind, is at work in the main thread.

    look: gives what is known of all cells by now; changed(outcomes): called whenever a cell ended. When `request` holds a
    signal it is passed on to the cells, through the desk, once.
    """

    def __init__(
        self,
        console: Console,
        desk: JobStatusStore,
        look: Callable[[], list[Outcome]],
        changed: Callable[[Sequence[Outcome]], None],
        request: StopRequest,
    ) -> None:
        self._console, self._desk, self._look, self._changed, self._request = console, desk, look, changed, request
        self._told = {id(o.cell) for o in look() if o.status == "done"}
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
        asked = False
        with self._live() as live:
            while True:
                over = self._over.wait(TICK / 5 if self._request.signum and not asked else TICK)
                if self._request.signum is not None and not asked:
                    asked = True
                    self._desk.ask_to_stop(self._request.signum)
                    self._console.print(
                        "Stopping: the cells that run save and end. The same command goes on from there."
                    )
                found = self._look()
                self._tell(found)
                if live is not None:
                    live.update(self._view(found), refresh=True)
                if over:
                    return

    def _tell(self, found: Sequence[Outcome]) -> None:
        ended = [o for o in found if id(o.cell) not in self._told and o.status not in ("not started", "running")]
        for outcome in ended:
            self._told.add(id(outcome.cell))
            why = f": {outcome.error}" if outcome.error else ""
            line = f"[{len(self._told)}/{len(found)}] {outcome.word}  {outcome.cell.title}  {duration(outcome.seconds)}{why}"
            self._console.print(line, soft_wrap=True)
        if ended:
            self._changed(found)

    @contextmanager
    def _live(self) -> Iterator[Live | None]:
        if not self._console.is_terminal:
            yield None
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            yield live

    def _view(self, found: Sequence[Outcome]) -> Group:
        running = [o for o in found if o.status == "running"]
        self._most_at_once = max(self._most_at_once, len(running))
        done, failed = (sum(o.status == status for o in found) for status in ("done", "failed"))
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"cells {done}/{len(found)}"),
            ProgressBar(total=len(found), completed=done + failed, width=30),
            Text(f"{failed} failed" if failed else "", style="red"),
            Text(time_left(found, self._most_at_once), style="dim"),
        )
        lines = [Text(f"  {o.cell.title}  {_stage(o.cell.folder)}", style="dim") for o in running]
        return Group(bar, *lines)


def time_left(found: Sequence[Outcome], at_once: int) -> str:
    """What the cells that ended took, for those that did not; nothing before one has."""
    took = [o.seconds for o in found if o.seconds is not None and o.status == "done"]
    left = sum(o.status in ("not started", "running") for o in found)
    if not took or not left:
        return ""
    return f"about {duration(left * sum(took) / len(took) / at_once)} left"


def _stage(folder: Path) -> str:
    """How far a running cell is, by its journal."""
    for line in reversed(tail(folder / "metrics.jsonl")):
        try:
            return f"step {json.loads(line)['step']}"
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be half written
    return ""
