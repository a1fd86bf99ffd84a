"""Learning curves over optimizer steps: loss, accuracy, rewards and margins of pairs, and rewards of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lab.reporting.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, FigureSpec

MARKERS = 10  # per line, about
POINTS = 200  # most per line; more are averaged over neighbours
WIDTH, HEIGHT = 4.4, 3.2  # of a panel, inches


@dataclass(frozen=True)
class Curve:
    """A column of the metrics log and how it is drawn."""

    name: str
    label: str
    look: str  # line and marker in matplotlib's format
    colour: str


def _both(name: str, colours: tuple[str, str] = (BLUE, VERMILLION), of: str = "") -> tuple[Curve, Curve]:
    return (
        Curve(f"train/{name}", f"{of}train", "-o", colours[0]),
        Curve(f"val/{name}", f"{of}validation", "--s", colours[1]),
    )


# title -> y label, value of a policy that learned nothing (None: there is none), curves
PANELS: dict[str, tuple[str, float | None, tuple[Curve, ...]]] = {
    "loss": ("loss", None, _both("loss")),
    "accuracy": (
        "share of pairs ranked as labelled",
        0.5,
        (
            *_both("rewards/accuracies"),
            Curve("val/true/rewards/accuracies", "validation, by gold", ":^", GREEN),
            Curve("train/flipped/rewards/accuracies", "train, flipped pairs", "-.D", ORANGE),
        ),
    ),
    "rewards": (
        "implicit reward (beta x log-ratio)",
        0.0,
        (
            *_both("rewards/chosen", (BLUE, BLUE), "chosen, "),
            Curve("train/rewards/rejected", "rejected, train", "-^", VERMILLION),
            Curve("val/rewards/rejected", "rejected, validation", "--D", VERMILLION),
        ),
    ),
    "margins": ("reward margin, chosen minus rejected", 0.0, _both("rewards/margins")),
    "rewards of samples": (
        "mean over samples",
        None,
        (
            Curve("train/rollout/reward", "reward", "-o", BLUE),
            Curve("train/rollout/gold", "gold reward", "--s", GREEN),
        ),
    ),
    "KL divergence of samples": (
        "nats per response",
        0.0,
        (Curve("train/rollout/kl", "to the reference", "-o", BLUE),),
    ),
}


def curves(rows: Sequence[Mapping[str, Any]], is_reward: bool = False) -> FigureSpec | None:
    """Return the figure of the learning curves, without panels that have no data; None if all are empty.

    rows: of the metrics log; is_reward: whether rewards are those of a reward model.
    """
    shown = {
        title: found
        for title, (_, _, columns) in PANELS.items()
        if (found := [(curve, *points) for curve in columns if (points := points_of(rows, curve.name)) is not None])
    }
    if not shown:
        return None
    across = min(2, len(shown))
    down = math.ceil(len(shown) / across)

    def draw(figure: Any) -> None:
        axes = figure.subplots(down, across, squeeze=False).flat
        for axis, (title, found) in zip(axes, shown.items(), strict=False):
            _panel(axis, title, found, "reward" if is_reward and title == "rewards" else PANELS[title][0])
        for axis in list(axes)[len(shown) :]:
            axis.set_axis_off()

    return FigureSpec(draw, (WIDTH * across, HEIGHT * down))


def points_of(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]] | None:
    """Return steps and values of a column, non-finite values as NaN (a gap); None if no finite value was logged."""
    logged = [(row["step"], float(row[name])) for row in rows if name in row]
    values = [value if math.isfinite(value) else math.nan for _, value in logged]
    if all(math.isnan(value) for value in values):
        return None
    return [step for step, _ in logged], values


def thinned(steps: Sequence[int], values: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float], int]:
    """Return at most `most` points and how many neighbours each is the mean of, without NaN."""
    of_each = math.ceil(len(steps) / most)
    x, y = [], []
    for start in range(0, len(steps), of_each):
        part = slice(start, start + of_each)
        finite = [value for value in values[part] if not math.isnan(value)]
        x.append(statistics.fmean(steps[part]))
        y.append(statistics.fmean(finite) if finite else math.nan)
    return x, y, of_each


def _panel(axis: Any, title: str, found: Sequence[tuple[Curve, list[int], list[float]]], ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    nothing_learned = PANELS[title][1]
    if nothing_learned is not None:
        axis.axhline(nothing_learned, color=GREY, lw=0.8)
    most = 1
    for curve, steps, values in found:
        x, y, of_each = thinned(steps, values)
        most = max(most, of_each)
        every = max(1, len(x) // MARKERS)
        axis.plot(x, y, curve.look, color=curve.colour, ms=3.5, lw=1.3, markevery=every, label=curve.label)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    xlabel = f"optimizer steps (points: means of up to {most} steps logged)" if most > 1 else "optimizer steps"
    gaps = sum(math.isnan(value) for _, _, values in found for value in values)
    axis.set(title=f"{title}: {gaps} not finite" if gaps else title, xlabel=xlabel, ylabel=ylabel)
    axis.legend()
