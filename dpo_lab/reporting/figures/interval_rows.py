"""Charts with one row per value and its interval, and one effect on a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lab.reporting.figures.axes import Scale, around
from dpo_lab.reporting.figures.markers import CHARACTER, bar, elide, escape_text, marker, px
from dpo_lab.reporting.figures.svg import BOTTOM, TOP, Frame, Interval, framed, ticks_below


@dataclass(frozen=True)
class Row:
    """A row of a chart: a value with its interval, and the single values behind it."""

    label: str
    value: float | None
    interval: Interval | None = None
    parts: Sequence[float] = ()
    look: int | str = 0
    says: str = ""


def rows(title: str, xlabel: str, of: Sequence[Row], reference: float | None = None) -> str:
    """Return the SVG of a chart with a row per value and a line at `reference`; empty if no row has a value."""
    values = [v for row in of for v in (row.value, *(row.interval or ()), *row.parts) if v is not None]
    scale = around([*values, *([reference] if reference is not None else [])])
    if not values or scale is None:
        return ""
    longest = max(len(row.label) for row in of)
    left = min(max(90.0, 14 + CHARACTER * longest), 190.0)
    frame = Frame(scale, Scale(len(of) - 0.5, -0.5), TOP + BOTTOM + 24 * len(of), left)
    outer, inner = ticks_below(frame), []
    if reference is not None:
        x, _ = frame.at(reference, 0)
        inner.append(f'<line class="level" x1="{px(x)}" x2="{px(x)}" y1="0" y2="{px(frame.depth)}"/>')
    most = int((left - 14) / CHARACTER)
    for number, row in enumerate(of):
        _, y = frame.at(scale.low, number)
        outer.append(
            f'<text x="{px(left - 8)}" y="{px(TOP + y + 4)}" text-anchor="end">{escape_text(elide(row.label, most))}'
            f"<title>{escape_text(row.label)}</title></text>"
        )
        if row.value is None:
            inner.append(f'<text class="dim" x="4" y="{px(y + 4)}">not measured</text>')
            continue
        dots = "".join(f'<circle cx="{px(frame.at(v, 0)[0])}" cy="{px(y + 7)}" r="2"/>' for v in row.parts)
        inner.append(f'<g class="c{row.look} cloud">{dots}</g>')
        x, _ = frame.at(row.value, 0)
        line = bar(frame.at(row.interval[0], 0)[0], y, frame.at(row.interval[1], 0)[0], y) if row.interval else ""
        inner.append(f'<g class="c{row.look}">{line}{marker(x, y, row.look)}<title>{escape_text(row.says)}</title></g>')
    return framed(frame, title, xlabel, outer, inner)


def effect(value: float, interval: Interval | None, at_least: float, says: str, both: bool = False) -> str:
    """Return the SVG of an effect with its interval, 0, and the smallest relevant effect (both: on either side of 0)."""
    marks = (-at_least, at_least) if both else (at_least,) if at_least else ()
    scale = around([0.0, value, *(interval or ()), *marks], room=0.08)
    assert scale is not None
    width, height = 220, 30
    x = {v: width * scale.place(v) for v in (0.0, value, *(interval or ()), *marks)}
    parts = [f'<line class="axis" x1="{px(x[0.0])}" x2="{px(x[0.0])}" y1="2" y2="{height - 2}"/>']
    parts += [f'<line class="level" x1="{px(x[m])}" x2="{px(x[m])}" y1="2" y2="{height - 2}"/>' for m in marks]
    line = bar(x[interval[0]], height / 2, x[interval[1]], height / 2) if interval else ""
    parts.append(f'<g class="c0">{line}{marker(x[value], height / 2, 0)}</g>')
    return (
        f'<svg class="effect" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape_text(says)}"><title>{escape_text(says)}</title>{"".join(parts)}</svg>'
    )
