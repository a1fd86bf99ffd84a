"""The charts of a report as data, which `templates/charts.js` draws with Observable Plot in the reader's browser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from dpo_lab.reporting.formatting import strip_control

STYLES = 7  # distinct by colour, marker and dash; GREY is for all further ones
GREY = "x"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A point with its intervals, its tooltip, and the name written beside it. y: a number, or the label of a row."""

    x: float
    y: float | str
    tip: str = ""
    name: str = ""
    x_interval: Interval | None = None
    y_interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """Points in one style. label: its entry in the legend; cloud: small points, (x, y); dash: of its line, else that of
    the style; has_band: y intervals are a band instead of bars; shift: px to the right, to separate series at the same x;
    arm: starts the tooltips of points without one, if the label names several arms.
    """

    label: str
    points: Sequence[Point]
    style: int | str = 0
    is_line: bool = True
    has_markers: bool = True
    cloud: Sequence[tuple[float, float | str]] = ()
    dash: str = ""
    has_band: bool = False
    shift: float = 0.0
    arm: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. x, y: "linear", "log" or "root" (square root, for KL, which spans a hundred nats while the first
    few matter most); ticks: of x; lines: at these x, solid; dashed: at these x; rows: labels of y from top to bottom.
    """

    title: str
    xlabel: str
    series: Sequence[Series]
    x: str = "linear"
    y: str = "linear"
    ticks: Sequence[float] = ()
    lines: Sequence[float] = ()
    dashed: Sequence[float] = ()
    rows: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        points = (p for s in self.series for p in s.points)
        return not any(math.isfinite(p.x) and (isinstance(p.y, str) or math.isfinite(p.y)) for p in points)


@dataclass(frozen=True)
class Chart:
    """Panels side by side with one legend, and a sentence on how to read them."""

    title: str
    panels: Sequence[Panel]
    caption: str = ""

    @property
    def legend(self) -> list[Series]:
        """A series of each label, grey ones last; empty for a single one."""
        found = {s.label: replace(s, points=(), cloud=()) for panel in self.panels for s in panel.series if s.label}
        return sorted(found.values(), key=lambda s: STYLES if s.style == GREY else s.style) if len(found) > 1 else []

    @property
    def tips(self) -> list[str]:
        """The tooltips of all points, for readers without a pointer or without JavaScript."""
        return [p.tip for panel in self.panels for s in panel.series for p in s.points if p.tip]

    @property
    def data(self) -> Any:
        """What charts.js draws: plain lists and dicts without defaults."""
        return plain({"panels": self.panels, "legend": self.legend})


def chart(title: str, panels: Iterable[Panel], caption: str = "") -> Chart | None:
    """Return the chart of the panels that are not empty; None if all are."""
    kept = [panel for panel in panels if not panel.is_empty]
    return Chart(title, kept, caption) if kept else None


def plain(value: Any) -> Any:
    """Return dataclasses as dicts without defaults, numbers to six digits, those that are not finite as None."""
    if is_dataclass(value):
        set_fields = ((f.name, f.default, getattr(value, f.name)) for f in fields(value))
        return {name: plain(v) for name, default, v in set_fields if v != default}
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, str):
        return strip_control(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [plain(v) for v in value] if isinstance(value, Sequence) else value
