"""Progress of long stages: a bar on a terminal and in a notebook, one line per finished stage elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
WIDTH = 20  # columns of the bar
REDRAWN = 0.2  # seconds between two drawings of a bar in a notebook
_HIDES_BARS: ContextVar[bool] = ContextVar("hides_bars", default=False)


@contextmanager
def track(what: str, total: int, shown: bool = True, done: int = 0, least: float = 0.0) -> Iterator[Advance]:
    """Show the progress of a stage of `total` parts, `done` of them beforehand.

    Yields advance(parts, figures=None): add finished parts, and set the texts after the bar, shown in order as far as
    they fit. In a pipe or a file it prints one line without colours when the stage ends. shown: False on all ranks but
    one; least: a stage that took fewer seconds leaves no line.
    """
    if not shown or _HIDES_BARS.get():
        yield lambda parts, figures=None: None
    elif get_console().is_jupyter:
        with _cell(what, total, done, least) as advance:
            yield advance
    elif is_watched():
        with _bar(what, total, done, least) as advance:
            yield advance
    else:
        with _line(what, total, done, least) as advance:
            yield advance


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress of stages inside, which would disturb the bar of the stage that they are part of."""
    token = _HIDES_BARS.set(True)
    try:
        yield
    finally:
        _HIDES_BARS.reset(token)


def plain_console(**settings: Any) -> Console:
    """Create a console that prints strings literally: brackets and colons in overrides or paths are not markup.

    Give styles as `style=` or in a Text.
    """
    return Console(markup=False, emoji=False, highlight=False, **settings)


def is_watched() -> bool:
    """Return whether standard output is a terminal that can redraw a line."""
    return sys.stdout.isatty() and get_console().is_interactive


def log_handler() -> logging.Handler:
    """Return the handler of log messages: on a terminal above the progress bar, else one message per line."""
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
    title, width = (what, 8) if is_narrow else (f"{what:<20}", WIDTH)
    taken = len(title) + width + len(f"{total}/{total}") + TIME + 4  # plus a space between columns
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
def _cell(what: str, total: int, done: int, least: float) -> Iterator[Advance]:
    """Draw a bar in the output of a notebook's cell, and redraw it in place."""
    from IPython.display import display  # type: ignore[import-not-found]

    started, drawn, newest, handle = time.monotonic(), 0.0, "", None

    def draw() -> None:
        nonlocal drawn, handle
        drawn = time.monotonic()
        if (seconds := drawn - started) < least:
            return
        bar = "\u2501" * round(WIDTH * done / max(1, total))
        text = f"{what:<20} {bar:<{WIDTH}} {done}/{total} {timedelta(seconds=round(seconds))} {newest}".rstrip()
        if handle is None:
            handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": text}, raw=True)

    def advance(parts: int, figures: Sequence[str] | None = None) -> None:
        nonlocal done, newest
        done += parts
        if figures is not None:
            newest = "  ".join(figures)
        if time.monotonic() - drawn >= REDRAWN:
            draw()

    try:
        draw()
        yield advance
    finally:
        draw()


@contextmanager
def _line(what: str, total: int, done: int, least: float) -> Iterator[Advance]:
    started, newest = time.monotonic(), ""

    def advance(parts: int, figures: Sequence[str] | None = None) -> None:
        nonlocal done, newest
        done += parts
        if figures is not None:
            newest = ", ".join(figures)

    def print_line(state: str, seconds: float) -> None:
        suffix = f"; {newest}" if newest else ""
        print(f"{what}: {state} {timedelta(seconds=round(seconds))}{suffix}", flush=True)

    try:
        yield advance
    except BaseException:
        print_line(f"stopped at {done} of {total} after", time.monotonic() - started)
        raise
    if (seconds := time.monotonic() - started) >= least:
        print_line(f"{done} of {total} in", seconds)


def fitting(figures: Sequence[str], room: int) -> str:
    """Join as many of the figures, in order, as fit into `room` columns.

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
