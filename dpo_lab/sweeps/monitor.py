"""Monitor a running sweep: one line per finished job, and a progress bar on a terminal."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_lab.distributed.signals import StopRequest
from dpo_lab.runs.metrics_log import METRICS_LOG
from dpo_lab.sweeps.job_status import Outcome, StatusReader, SweepFolder, tail
from dpo_lab.sweeps.summary import duration

TICK = 0.5  # seconds between two reads of the jobs' status


@contextmanager
def monitor(
    console: Console,
    sweep: SweepFolder,
    reader: StatusReader,
    changed: Callable[[Sequence[Outcome]], None],
    request: StopRequest,
) -> Iterator[None]:
    """Show the status of the jobs in a thread while a launcher runs in the main thread.

    changed(outcomes): called when a job has ended. When `request` holds a signal, the jobs are asked once to stop.
    """
    over = threading.Event()

    def run() -> None:
        reported = {id(outcome.job) for outcome in reader.outcomes() if outcome.status == "done"}
        most_at_once, forwarded, is_last = 1, False, False
        live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        with live or nullcontext():
            while not is_last:
                is_last = over.wait(TICK / 5 if request.signum and not forwarded else TICK)
                if request.signum is not None and not forwarded:
                    forwarded = True
                    sweep.request_stop(request.signum)
                    console.print("Stopping: running jobs save and end. The same command resumes them.")
                outcomes = reader.outcomes()
                if _report(console, outcomes, reported):
                    changed(outcomes)
                most_at_once = max(most_at_once, sum(outcome.status == "running" for outcome in outcomes))
                if live is not None:
                    live.update(view(outcomes, most_at_once), refresh=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(console: Console, outcomes: Sequence[Outcome], reported: set[int]) -> bool:
    """Print a line for each job that has ended and is not in `reported`; add it there. Return whether there was one."""
    ended = [o for o in outcomes if id(o.job) not in reported and o.status not in ("not started", "running")]
    for outcome in ended:
        reported.add(id(outcome.job))
        why = f": {outcome.error}" if outcome.error else ""
        count = f"[{len(reported)}/{len(outcomes)}]"
        line = f"{count} {outcome.word}  {outcome.job.title}  {duration(outcome.seconds)}{why}"
        console.print(line, soft_wrap=True)
    return bool(ended)


def view(outcomes: Sequence[Outcome], at_once: int) -> Group:
    """Return the progress bar and a line per running job. at_once: the most jobs that ran at the same time so far."""
    done, failed = (sum(outcome.status == status for outcome in outcomes) for status in ("done", "failed"))
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        Text(f"jobs {done}/{len(outcomes)}"),
        ProgressBar(total=len(outcomes), completed=done + failed, width=30),
        Text(f"{failed} failed" if failed else "", style="red"),
        Text(time_left(outcomes, at_once), style="dim"),
    )
    running = [outcome.job for outcome in outcomes if outcome.status == "running"]
    return Group(bar, *(Text(f"  {job.title}  {_stage(job.folder)}", style="dim") for job in running))


def time_left(outcomes: Sequence[Outcome], at_once: int) -> str:
    """Return the estimated time left, from the mean time of finished jobs; an empty text before the first."""
    took = [o.seconds for o in outcomes if o.seconds is not None and o.status == "done"]
    left = sum(o.status in ("not started", "running") for o in outcomes)
    if not took or not left:
        return ""
    return f"about {duration(left * sum(took) / len(took) / at_once)} left"


def _stage(folder: Path) -> str:
    """Return the last step in a running job's metrics log; an empty text before the first."""
    for line in reversed(tail(folder / METRICS_LOG)):
        try:
            return f"step {json.loads(line)['step']}"
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be incomplete
    return ""
