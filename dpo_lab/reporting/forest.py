"""Forest plots: a line for each claim, its effect with its interval in units of the smallest effect that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lab.reporting import comparison
from dpo_lab.stats.paired_tests import NOT_SUPPORTED, SUPPORTED, Verdict
from dpo_lab.studies.spec import Direction, Prediction

WIDTH, HEIGHT = 320, 24  # of a line's drawing, px
MARGIN = 10  # px, beside the outermost tick
MOST = 30.0  # units at the ends of the axis; what lies beyond is drawn as an arrow
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
MARKS = {SUPPORTED: "●", NOT_SUPPORTED: "◆"}  # beside the word, for readers who see no colours
OPEN = "○"


@dataclass(frozen=True)
class Drawing:
    """A line's interval, px from the left. value, low, high: its ends within the axis; is_below, is_above: whether it goes
    on beyond it; zone: from where to where an effect is as predicted and large enough; label: the same in words.
    """

    value: float
    low: float
    high: float
    is_below: bool
    is_above: bool
    zone: tuple[float, float]
    label: str


@dataclass(frozen=True)
class Claim:
    """A line of a forest plot. drawing: None without an effect, or without a smallest one that matters."""

    description: str
    word: str
    effect: str
    predicted: str
    seeds: int
    is_primary: bool
    drawing: Drawing | None

    @property
    def mark(self) -> str:
        return MARKS.get(self.word, OPEN)


def claims(judged: Sequence[tuple[Prediction, Verdict]], only_primary: bool = False) -> list[Claim]:
    """Return the lines of a study's predictions."""
    return [
        Claim(
            prediction.description,
            verdict.word,
            comparison.effect_text(verdict.effect, prediction.scale) if verdict.effect else "not measured",
            comparison.predicted(prediction),
            len(verdict.seeds),
            prediction.primary,
            _drawing(prediction, verdict),
        )
        for prediction, verdict in judged
        if prediction.primary or not only_primary
    ]


def in_units(prediction: Prediction, verdict: Verdict) -> tuple[float, float, float] | None:
    """Return effect, low and high end of its interval in units of the smallest effect that matters, of factors by their
    logarithms; above 0 if as predicted (of `same`: with their own sign). None without an effect or such a unit.

    The ends are infinite without an interval.
    """
    if verdict.effect is None or not (unit := prediction.least):
        return None
    sign = -1 if prediction.direction is Direction.less else 1
    low, high = sorted(sign * end / unit for end in verdict.effect.interval or (-math.inf, math.inf))
    return sign * verdict.effect.value / unit, low, high


def place(units: float) -> float:
    """Return the place of an effect on the axis, px from the left: linear around 0, logarithmic further out."""
    share = math.asinh(max(-MOST, min(MOST, units))) / math.asinh(MOST)
    return round(WIDTH / 2 + share * (WIDTH / 2 - MARGIN), 1)


@dataclass(frozen=True)
class Plot:
    """What all lines share. ticks: their places and labels; says: how to read the plot."""

    ticks: Sequence[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    says: str = (
        "Drawn is the effect with its 95 % interval over seeds, divided by the smallest effect that matters, so that claims"
        " are comparable. To the right: as predicted. Solid line: no effect; dashed lines: the smallest effect that matters;"
        " shaded: where an effect is as predicted and matters. The axis is linear around 0 and logarithmic further out; an"
        " arrow goes on beyond it."
    )


PLOT = Plot([(place(tick), str(tick).replace("-", "−")) for tick in TICKS])


def _drawing(prediction: Prediction, verdict: Verdict) -> Drawing | None:
    found = in_units(prediction, verdict)
    if found is None:
        return None
    value, low, high = found
    zone = (place(-1), place(1)) if prediction.direction is Direction.same else (place(1), float(WIDTH))
    interval = f" ({low:.2g} .. {high:.2g})" if low < high and math.isfinite(high - low) else ""
    label = f"{value:.2g}{interval} times the smallest effect that matters"
    return Drawing(place(value), place(low), place(high), low < -MOST, high > MOST, zone, label)
