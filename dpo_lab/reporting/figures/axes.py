"""Axes of SVG charts: scales, ticks and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Spacing(str, Enum):
    """How values are laid out along an axis."""

    linear = "linear"
    log = "log"
    root = "root"  # square root, for KL, which spans a hundred nats while the first few matter most


@dataclass(frozen=True)
class Scale:
    """An axis from low to high. marks: values of ticks; chosen automatically if empty."""

    low: float
    high: float
    spacing: Spacing = Spacing.linear
    marks: Sequence[float] = ()

    def place(self, value: float) -> float:
        """Return the position of a value, 0 at the low end and 1 at the high end."""
        low, high, at = (_spaced(v, self.spacing) for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Return the ticks, (value, label)."""
        wanted = self.marks or self._chosen(most)
        inside = [v for v in wanted if self.low - 1e-12 <= v <= self.high + 1e-12]
        if self.spacing is Spacing.linear and not self.marks:
            step = inside[1] - inside[0] if len(inside) > 1 else 1.0
            return [(v, _stepped(v, step)) for v in inside]
        return [(v, format_short(v)) for v in inside]

    def _chosen(self, most: int) -> list[float]:
        if self.spacing is Spacing.log:
            return _decades(self.low, self.high, most)
        if self.spacing is Spacing.root:
            return _thinned(_decades(max(self.high / 500, 1e-9), self.high, 99), self, most)
        return nice(self.low, self.high, most)


def around(values: Iterable[float], spacing: Spacing = Spacing.linear, room: float = 0.06) -> Scale | None:
    """Return a scale that covers all finite values with some room; None if there are none."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or spacing is not Spacing.log)]
    if not known:
        return None
    low, high = min(known), max(known)
    if spacing is Spacing.root:
        return Scale(0.0, max(high, 1e-6) * (1 + 2 * room), spacing)
    if spacing is Spacing.log:
        span = max(high / low, 1.5) ** room
        return Scale(low / span, high * span, spacing)
    if high - low <= 1e-9 * max(1e-3, abs(low), abs(high)):
        half = 0.1 * abs(low) or 0.1
        return Scale(low - half, high + half)
    return Scale(low - room * (high - low), high + room * (high - low))


def without_outliers(values: Sequence[float]) -> tuple[list[float], int]:
    """Return the finite values without outliers, and the number of outliers; those of a diverged run would squeeze all
    other values into a line.
    """
    known = sorted(v for v in values if math.isfinite(v))
    if len(known) < 20:
        return known, 0
    low, high = known[len(known) // 20], known[-1 - len(known) // 20]
    reach = 5 * (high - low) or math.inf
    kept = [v for v in known if low - reach <= v <= high + reach]
    return kept, len(known) - len(kept)


def nice(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round values from low to high, at steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next((m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most), 50 * power)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def format_value(value: float) -> str:
    """Return a number as text for a table: three decimals, fewer if it is large, an exponent if it is tiny."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e5:
        return _with_unit(value)
    if size and size < 5e-4:
        return f"{value:.1e}"
    text = f"{value:,.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return text.removeprefix("-") if not float(text.replace(",", "")) else text


def signed(value: float) -> str:
    """Return a number as text, with its sign."""
    text = format_value(value)
    return text if text.startswith("-") else f"+{text}"


def format_short(value: float) -> str:
    """Return a number as short text: 0.1, 3, 2.5k."""
    return _with_unit(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _with_unit(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _stepped(value: float, step: float) -> str:
    """Return a tick label with enough decimals to differ from its neighbours."""
    if abs(value) >= 1e4 or (value and abs(value) < 1e-4):
        return format_short(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}"


def _decades(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def _thinned(values: Sequence[float], scale: Scale, most: int) -> list[float]:
    """Return 0 and the values that are far enough apart on the scale."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if all(abs(scale.place(value) - scale.place(other)) >= 0.8 / most for other in [*kept, 0.0]):
            kept.append(value)
    return [0.0, *sorted(kept)]


def _spaced(value: float, spacing: Spacing) -> float:
    if spacing is Spacing.log:
        return math.log10(max(value, 1e-300))
    return math.copysign(math.sqrt(abs(value)), value) if spacing is Spacing.root else value
