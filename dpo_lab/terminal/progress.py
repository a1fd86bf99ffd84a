"""Progress of long stages: a bar on a terminal, one line per finished stage elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich import get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from dpo_lab.runs.redact import Redacting

Advance = Callable[..., None]

NARROW = 100  # columns: a terminal with fewer gets a shorter bar
TIME = 8  # columns of the time left


@contextmanager
def track(what: str, total: int, shown: bool = True, done: int = 0, least: float = 0.0) -> Iterator[Advance]:
    """A stage of `total` parts, `done` of them beforehand. Gives advance(parts, figures=None): so many parts more, and texts
    to stand behind the bar, of which as many are shown as fit, the first ones first.

    In a pipe or a file it is one line without colours, when the stage is over. shown: of several ranks' bars one is enough;
    least: a stage that took fewer seconds leaves nothing behind.
    """
    if not shown:
        yield lambda parts, figures=None: None
    elif is_watched():
        with _bar(what, total, done, least) as advance:
            yield advance
    else:
        with _line(what, total, done, least) as advance:
            yield advance


def plain_console(**settings: Any) -> Console:
    """Create a console that prints a string as it is: brackets and colons in an override, a path or a sample are no markup.

    Styles are given as `style=` or in a Text.
    """
    return Console(markup=False, emoji=False, highlight=False, **settings)


def is_watched() -> bool:
    """Whether standard output is a terminal that can redraw a line."""
    return sys.stdout.isatty() and get_console().is_interactive


def log_handler() -> logging.Handler:
    """Where log lines go on the terminal: above the bar and wrapped there; whole, one a line, in a pipe or a file."""
    if is_watched():
        handler: logging.Handler = RichHandler(show_path=False, log_time_format="%X")
        handler.setFormatter(Redacting("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(Redacting("[%(asctime)s] %(levelname)-8s %(message)s", "%X"))
    return handler


@contextmanager
def _bar(what: str, total: int, done: int, least: float) -> Iterator[Advance]:
    console, started = get_console(), time.monotonic()
    is_narrow = console.width < NARROW
    title, width = (what, 8) if is_narrow else (f"{what:<20}", 20)
    taken = len(title) + width + len(f"{total}/{total}") + TIME + 4  # a blank between two columns
    with Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=width),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, figures="")

        def advance(parts: int, figures: Sequence[str] | None = None) -> None:
            bar.advance(task, parts)
            if figures is not None:
                bar.update(task, figures=fitting(figures, console.width - taken))

        yield advance
        bar.live.transient = time.monotonic() - started < least


@contextmanager
def _line(what: str, total: int, done: int, least: float) -> Iterator[Advance]:
    started, newest = time.monotonic(), ""

    def advance(parts: int, figures: Sequence[str] | None = None) -> None:
        nonlocal done, newest
        done += parts
        if figures is not None:
            newest = ", ".join(figures)

    def say(how: str, seconds: float) -> None:
        behind = f"; {newest}" if newest else ""
        print(f"{what}: {how} {timedelta(seconds=round(seconds))}{behind}", flush=True)

    try:
        yield advance
    except BaseException:
        say(f"stopped at {done} of {total} after", time.monotonic() - started)
        raise
    if (seconds := time.monotonic() - started) >= least:
        say(f"{done} of {total} in", seconds)


def fitting(figures: Sequence[str], room: int) -> str:
    """As many of the figures, in order, as fit into `room` columns.

    >>> fitting(["loss 0.693", "margin 0.012", "1,024 tokens/s"], 26)
    'loss 0.693  margin 0.012'
    """
    text = ""
    for figure in figures:
        longer = f"{text}  {figure}" if text else figure
        if len(longer) > room:
            break
        text = longer
    return text
