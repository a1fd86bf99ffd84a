"""Draw small SVG charts whose classes the page's style sheet colours for light and dark.

Independent of runs. Text stays text; every point has a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dpo_lab.reporting.figures.axes import Scale, Spacing, around, without_outliers
from dpo_lab.reporting.figures.markers import CHARACTER, bar, dashed, elide, escape_text, marker, px

WIDTH, HEIGHT = 440, 290  # of a panel, px; scaled down on narrow pages
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 44
MIN_GAP = 5  # px between names beside each other
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A point with its intervals, tooltip (says), and the name written beside it."""

    x: float
    y: float
    says: str = ""
    name: str = ""
    x_interval: Interval | None = None
    y_interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """A series of points. look: style number, or GREY; cloud: small points, (x, y); band: (x, low, high)."""

    label: str
    points: Sequence[Point]
    look: int | str = 0
    is_line: bool = True
    has_markers: bool = True
    cloud: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    dash: str | None = None
    shift: float = 0.0  # px to the right, to separate series at the same x


@dataclass(frozen=True)
class Panel:
    """One pair of axes. x, y: spacing; marks: ticks of x; x_from: scale of x, if not from the points."""

    title: str
    xlabel: str
    series: Sequence[Series]
    x: Spacing = Spacing.linear
    y: Spacing = Spacing.linear
    marks: Sequence[float] = ()
    x_from: Scale | None = None
    height: float = HEIGHT


@dataclass
class Frame:
    """Axes in px. taken: boxes that names must not overlap."""

    x: Scale
    y: Scale
    height: float = HEIGHT
    left: float = LEFT
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def width(self) -> float:
        return WIDTH - self.left - RIGHT

    @property
    def depth(self) -> float:
        return self.height - TOP - BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in px, from the plot's upper left corner."""
        return self.width * self.x.place(x), self.depth * (1 - self.y.place(y))

    def name_place(self, x: float, y: float, text: str) -> tuple[float, float, str] | None:
        """Return where a point's name fits beside it without overlap: x, y, anchor; None if nowhere."""
        width = CHARACTER * len(text)
        spots = (
            (7, -5, "start"),
            (7, 14, "start"),
            (-7, -5, "end"),
            (-7, 14, "end"),
            (0, -9, "middle"),
            (0, 19, "middle"),
            (12, -14, "start"),
            (-12, -14, "end"),
            (12, 24, "start"),
            (-12, 24, "end"),
        )
        for right, down, anchor in spots:
            left = x + right - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + down - 10, left + width, y + down + 3)
            inside = box[0] >= 0 and box[2] <= self.width and box[1] >= 0 and box[3] <= self.depth
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append((box[0] - MIN_GAP, box[1], box[2] + MIN_GAP, box[3]))
                return x + right, y + down, anchor
        return None


def panel(of: Panel) -> str:
    """Return the SVG of a panel; empty if it has no finite point."""
    points = [p for s in of.series for p in s.points]
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))] + [x for s in of.series for x, *_ in s.band]
    lines = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    ys = lines + [v for s in of.series for _, low, high in s.band for v in (low, high)]
    clouds = [point for s in of.series for point in s.cloud]
    kept, beyond = without_outliers(ys + [y for _, y in clouds])
    x_scale = of.x_from or around(xs + [x for x, _ in clouds], of.x)
    y_scale = around(kept, of.y)
    if x_scale is None or y_scale is None:
        return ""
    x_scale = Scale(x_scale.low, x_scale.high, x_scale.spacing, tuple(sorted(set(of.marks))))
    frame = Frame(x_scale, y_scale, of.height)
    if any(point.name for point in points):
        frame.taken = [box for s in of.series for box in _boxes(frame, s)]
    inner = [_band(frame, s) for s in of.series]
    inner += [_line(frame, s) for s in of.series if s.is_line]
    inner += [_cloud(frame, s) for s in of.series]
    inner += [_points(frame, s) for s in of.series if s.has_markers]
    inner += [_names(frame, s) for s in of.series]
    title = f"{of.title} ({beyond} outliers not shown)" if beyond else of.title
    return framed(frame, title, of.xlabel, [*_grid(frame)], inner)


def framed(frame: Frame, title: str, xlabel: str, outer: Iterable[str], inner: Iterable[str]) -> str:
    """Return the SVG of axes with titles. outer: parts of the whole drawing; inner: parts clipped to the plot."""
    middle, title = frame.left + frame.width / 2, elide(title, 58)
    centre = middle if CHARACTER * len(title) / 2 < WIDTH - middle else WIDTH / 2
    return "\n".join(
        [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {px(frame.height)}" width="{WIDTH}" height="{px(frame.height)}"'
            f' role="img" aria-label="{escape_text(title)}">',
            f'<text class="title" x="{px(centre)}" y="16" text-anchor="middle">{escape_text(title)}</text>',
            *outer,
            f'<text class="dim" x="{px(middle)}" y="{px(frame.height - 8)}" text-anchor="middle">'
            f"{escape_text(elide(xlabel, 56))}</text>",
            f'<svg x="{px(frame.left)}" y="{TOP}" width="{px(frame.width)}" height="{px(frame.depth)}"'
            f' viewBox="0 0 {px(frame.width)} {px(frame.depth)}">',
            *(part for part in inner if part),
            "</svg></svg>",
        ]
    )


def _grid(frame: Frame) -> list[str]:
    found = ticks_below(frame)
    for value, label in frame.y.ticks(5):
        y = TOP + frame.at(frame.x.low, value)[1]
        found.append(f'<line class="grid" x1="{px(frame.left)}" x2="{px(WIDTH - RIGHT)}" y1="{px(y)}" y2="{px(y)}"/>')
        found.append(f'<text class="dim" x="{px(frame.left - 6)}" y="{px(y + 4)}" text-anchor="end">{label}</text>')
    return found


def ticks_below(frame: Frame) -> list[str]:
    """Return the lower axis; tick labels that would overlap an earlier one are left out."""
    floor = TOP + frame.depth
    found, free = [f'<path class="axis" d="M{px(frame.left)} {TOP}V{px(floor)}H{px(WIDTH - RIGHT)}"/>'], -math.inf
    for value, label in frame.x.ticks(6):
        x = frame.left + frame.width * frame.x.place(value)
        found.append(f'<line class="grid" x1="{px(x)}" x2="{px(x)}" y1="{TOP}" y2="{px(floor)}"/>')
        half = CHARACTER * len(label) / 2
        if x - half > free:
            found.append(f'<text class="dim" x="{px(x)}" y="{px(floor + 16)}" text-anchor="middle">{label}</text>')
            free = x + half + 4
    return found


def _boxes(frame: Frame, of: Series) -> list[tuple[float, float, float, float]]:
    """Return boxes around a series' points, bars and line segments, which names must not overlap."""
    shown = [p for p in of.points if math.isfinite(p.x) and math.isfinite(p.y)]
    places = [frame.at(p.x, p.y) for p in shown]
    boxes = [_box(x, y, 4) for x, y in places] if of.has_markers else []
    for point, (x, y) in zip(shown, places, strict=True):
        if point.x_interval:
            low, high = (frame.at(v, point.y)[0] for v in point.x_interval)
            boxes.append((low, y - 1, high, y + 1))
        if point.y_interval:
            low, high = (frame.at(point.x, v)[1] for v in point.y_interval)
            boxes.append((x - 1, high, x + 1, low))
    for (x1, y1), (x2, y2) in pairwise(places) if of.is_line else ():
        bits = max(1, round(math.hypot(x2 - x1, y2 - y1) / 5))
        boxes += [_box(x1 + (x2 - x1) * i / bits, y1 + (y2 - y1) * i / bits, 1.5) for i in range(bits + 1)]
    return boxes


def _band(frame: Frame, of: Series) -> str:
    known = [(x, low, high) for x, low, high in of.band if math.isfinite(low) and math.isfinite(high)]
    if len(known) < 2:
        return ""
    there = [frame.at(x, high) for x, _, high in known]
    back = [frame.at(x, low) for x, low, _ in reversed(known)]
    path = "L".join(f"{px(x)} {px(y)}" for x, y in [*there, *back])
    return f'<path class="c{of.look} band" d="M{path}Z"/>'


def _line(frame: Frame, of: Series) -> str:
    """Return a line through the points, with gaps at non-finite ones."""
    path, begins = [], True
    for point in of.points:
        if not (math.isfinite(point.x) and math.isfinite(point.y)):
            begins = True
            continue
        x, y = frame.at(point.x, point.y)
        x += of.shift
        path.append(f"{'M' if begins else 'L'}{px(x)} {px(y)}")
        begins = False
    says = f"<title>{escape_text(of.label)}</title>" if not of.has_markers else ""
    return f'<path class="c{of.look} line"{dashed(of.look, of.dash)} d="{"".join(path)}">{says}</path>' if path else ""


def _cloud(frame: Frame, of: Series) -> str:
    places = [frame.at(x, y) for x, y in of.cloud if math.isfinite(x) and math.isfinite(y)]
    dots = "".join(f'<circle cx="{px(x + of.shift + 6)}" cy="{px(y)}" r="2"/>' for x, y in places)
    return f'<g class="c{of.look} cloud">{dots}</g>' if dots else ""


def _points(frame: Frame, of: Series) -> str:
    drawn = []
    for point in of.points:
        if not (math.isfinite(point.x) and math.isfinite(point.y)):
            continue
        x, y = frame.at(point.x, point.y)
        x += of.shift
        drawn_bars = ""
        if point.y_interval:
            drawn_bars += bar(
                x, frame.at(point.x, point.y_interval[0])[1], x, frame.at(point.x, point.y_interval[1])[1]
            )
        if point.x_interval:
            drawn_bars += bar(
                frame.at(point.x_interval[0], point.y)[0], y, frame.at(point.x_interval[1], point.y)[0], y
            )
        drawn.append(f"<g>{drawn_bars}{marker(x, y, of.look)}<title>{escape_text(point.says)}</title></g>")
    return f'<g class="c{of.look}">{"".join(drawn)}</g>' if drawn else ""


def _names(frame: Frame, of: Series) -> str:
    found = []
    for point in of.points:
        if point.name and _is_inside(point, frame):
            text = elide(point.name, 30)
            if place := frame.name_place(*frame.at(point.x, point.y), text):
                x, y, anchor = place
                found.append(f'<text x="{px(x)}" y="{px(y)}" text-anchor="{anchor}">{escape_text(text)}</text>')
    return f'<g class="c{of.look} names">{"".join(found)}</g>' if found else ""


def _is_inside(point: Point, frame: Frame) -> bool:
    if not (math.isfinite(point.x) and math.isfinite(point.y)):
        return False
    x, y = frame.at(point.x, point.y)
    return -1 <= x <= frame.width + 1 and -1 <= y <= frame.depth + 1


def _box(x: float, y: float, half: float) -> tuple[float, float, float, float]:
    return x - half, y - half, x + half, y + half


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
