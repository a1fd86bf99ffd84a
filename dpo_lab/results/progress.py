"""The look of long stages on the terminal: one bar, its time left and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]


@contextmanager
def track(what: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """A bar for a stage of `total` parts. Gives advance(parts, figures=""): so many parts more, and a text behind the bar.

    shown: of several ranks' bars one is enough.
    """
    with Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
        disable=not shown,
    ) as bar:
        task = bar.add_task(what, total=total, figures="")

        def advance(parts: int, figures: str | None = None) -> None:
            bar.advance(task, parts)
            if figures is not None:
                bar.update(task, figures=figures)

        yield advance
