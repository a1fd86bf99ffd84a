"""The result of a sweep: its table on the terminal, `sweep.json`, and its exit code."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.redact import redact_command, redact_override
from dpo_lab.runs.run_record import now
from dpo_lab.sweeps.job_status import SWEEP, Outcome
from dpo_lab.sweeps.plan import Job

STYLES = {"done": "green", "resumed": "green", "skipped": "dim", "failed": "red", "not started": "yellow"}

MANY = 60  # jobs: with more of them the table omits those that are done or not started


def exit_code(results: Sequence[Outcome], stopped_by: int | None) -> int:
    """Return 0 if every job is done, else 128 + the signal that stopped the sweep, else 1."""
    if all(outcome.status == "done" for outcome in results):
        return 0
    return 1 if stopped_by is None else 128 + stopped_by


def write(folder: Path, results: Sequence[Outcome], started: str, status: str, error: str | None = None) -> None:
    """Write SWEEP atomically."""
    record: dict[str, Any] = {
        "status": status,
        "error": error,
        "command": redact_command(["python", "-m", _module(), *sys.argv[1:]]),
        "started": started,
        "finished": None if status == "running" else now(),
        "shared": shared_overrides([outcome.job for outcome in results]),
        "jobs": [
            {
                "overrides": [redact_override(override) for override in outcome.job.overrides],
                "folder": os.path.relpath(outcome.job.folder),
                "previous_status": outcome.previous_status.value,
                "status": outcome.status,
                "error": outcome.error,
                "seconds": None if outcome.seconds is None else round(outcome.seconds, 1),
                "log": None if outcome.log is None else os.path.relpath(outcome.log),
            }
            for outcome in results
        ],
    }
    write_atomic(folder / SWEEP, json.dumps(record, indent=1))


def shared_overrides(jobs: Sequence[Job]) -> list[str]:
    """Return the overrides that all jobs have, without secrets."""
    own = [override for override in jobs[0].overrides if not override.startswith("hydra.")]
    return [redact_override(override) for override in own if all(override in job.overrides for job in jobs)]


def show(console: Console, folder: Path, results: Sequence[Outcome], error: str | None) -> None:
    """Print the table of jobs, the errors with the paths of their logs, and the totals."""
    table = Table("job", "", "time", box=None, header_style="dim", pad_edge=False)
    shown = [outcome for outcome in results if len(results) <= MANY or outcome.status not in ("done", "not started")]
    for outcome in shown:
        style = STYLES.get(outcome.word, "yellow")
        table.add_row(outcome.job.title, Text(outcome.word, style), duration(outcome.seconds))
    if shown:
        console.print(table)
    for outcome in results:
        if outcome.error and outcome.status != "done":
            console.print(f"{outcome.job.title}: {outcome.error}", style="red")
            if outcome.log:
                console.print(f"  {os.path.relpath(outcome.log)}", soft_wrap=True)
    if error:
        console.print(f"the launcher failed: {error}", style="red")
    counts = Counter(outcome.word for outcome in results)
    total = ", ".join(f"{count} {word}" for word, count in counts.items())
    console.print(f"{len(results)} jobs: {total}. {folder / SWEEP}", soft_wrap=True)
    if any(outcome.status != "done" for outcome in results):
        console.print("The same command runs the rest.")


def duration(seconds: float | None) -> str:
    """Format seconds: 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _module() -> str:
    """Return the module that the command line started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name
