"""Plots over a run's pairs: margins of clean and flipped pairs, implicit reward against gold, calibration, length.

is_reward: whether the run trained a reward model, whose rewards are explicit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_lab.reporting.figures.style import BLUE, GREY, ORANGE, VERMILLION, FigureSpec
from dpo_lab.runs.examples import PairExample
from dpo_lab.stats.calibration import reliability
from dpo_lab.stats.estimates import Estimate, rank_correlation, wilson

BINS = 40  # of a distribution
CONFIDENCE_BINS = 10  # of the histogram of probabilities, from 1/2 to 1
POINTS = 2000  # most in a scatter plot
IMPLICIT = "implicit reward margin (beta x log-ratio margin)"


def margins(pairs: Sequence[PairExample], is_reward: bool = False) -> FigureSpec | None:
    """Return the figure of margins: clean training, flipped training and held-out pairs; None if no pairs."""
    groups = {
        "train, clean": ([p.margin for p in pairs if p.split == "train" and not p.flipped], BLUE, "-", None),
        "train, flipped": ([p.margin for p in pairs if p.split == "train" and p.flipped], VERMILLION, "-", "////"),
        "held-out": ([p.margin for p in pairs if p.split == "held-out"], "black", "--", None),
    }
    if not pairs:
        return None
    edges, is_cut = edges_of([p.margin for p in pairs])

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for label, (values, colour, line, hatch) in groups.items():
            if not values:
                continue
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            text = f"{label}: mean {np.mean(values):.2f}, n = {len(values):,}"
            if colour == BLUE:
                axis.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
            axis.stairs(shares, edges, color=colour, ls=line, lw=1.4, hatch=hatch, label=text)
        axis.axvline(0, color=GREY, lw=0.8)
        beyond = "; outer bins include values beyond" if is_cut else ""
        what = "reward margin" if is_reward else "log-ratio margin, nats"
        axis.set(
            title="Margins of pairs as labelled",
            xlabel=f"{what}{beyond}",
            ylabel="share of the group's pairs",
        )
        _head_room(axis)
        axis.legend()

    return FigureSpec(draw)


def gold(pairs: Sequence[PairExample], beta: float, is_reward: bool = False) -> FigureSpec | None:
    """Return the figure of reward margins against gold ones; None if no pair has a gold reward."""
    known = [(p.key, p.gold_margin, beta * p.margin) for p in pairs if p.gold_margin is not None]
    if not known:
        return None
    return _scatter(known, "gold reward", "gold reward margin, chosen minus rejected", is_reward)


def length(pairs: Sequence[PairExample], beta: float, is_reward: bool = False) -> FigureSpec | None:
    """Return the figure of reward margins against differences in length; None if there are no pairs."""
    if not pairs:
        return None
    points = [(p.key, float(p.length_chosen - p.length_rejected), beta * p.margin) for p in pairs]
    return _scatter(points, "length", "difference in tokens, chosen minus rejected", is_reward)


def calibration(pairs: Sequence[PairExample], bins: int) -> FigureSpec | None:
    """Return the reliability diagram of the probabilities given to labels and to gold preferences; None if there are
    none.

    The half from 1/2 to 1 is drawn, as the curve is its own mirror image; calibration errors are of the whole curve.
    """
    rated = [pair for pair in pairs if pair.probability is not None]
    if not rated:
        return None
    label = np.array([pair.probability for pair in rated])
    truth = np.array([pair.gold_margin or 0.0 for pair in rated])
    gold = np.where(truth > 0, label, 1 - label)[truth != 0]
    targets = {
        "gold": (gold, "s--", VERMILLION, 7),
        "labels": (label, "o-", BLUE, 4),
    }  # larger markers below smaller ones

    def draw(figure: Any) -> None:
        axis, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axis.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8)
        axis.annotate("calibrated", (0.9, 0.88), va="top", color=GREY, fontsize=8)
        for name, (probability, look, colour, size) in targets.items():
            if not len(probability):
                continue
            curve = reliability(probability, bins)
            # With an odd number of bins the one around 1/2 is left out: each pair is right and wrong there.
            drawn = curve.edge + 1e-9 >= 0.5
            x, y = curve.probability[drawn], curve.frequency[drawn]
            intervals = [
                wilson(right, 2 * len(probability) * part) for right, part in zip(y, curve.share[drawn], strict=True)
            ]
            reach = [[max(0.0, at - low), max(0.0, high - at)] for at, (low, high) in zip(y, intervals, strict=True)]
            text = f"by {name}: calibration error {curve.error:.3f}, n = {len(probability):,}"
            style = dict(
                color=colour, ms=size, mfc="none" if size > 4 else colour, lw=1.3, elinewidth=0.8, capsize=size / 2
            )
            axis.errorbar(x, y, np.array(reach).reshape(-1, 2).T, fmt=look, label=text, **style)
        edges = np.linspace(0.5, 1, CONFIDENCE_BINS + 1)
        counts.stairs(np.histogram(np.maximum(label, 1 - label), edges)[0], edges, fill=True, color=GREY)
        axis.set(title="Calibration on held-out pairs", ylabel="share that came true", ylim=(-0.03, 1.06))
        counts.set(xlabel="probability of the preferred response", ylabel="pairs", xlim=(0.49, 1.01))
        axis.legend(loc="lower right")

    return FigureSpec(draw, (6.0, 4.8))


def edges_of(values: Sequence[float]) -> tuple[np.ndarray, bool]:
    """Return edges of BINS bins between the percentiles 0.5 and 99.5, with some room, and whether values lie beyond
    them.
    """
    low, high = np.percentile(values, [0.5, 99.5])
    room = max(0.05 * (high - low), 1e-6 * max(abs(low), abs(high)), 1e-9)
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        room = 0.5 * max(1.0, abs(low))  # all values are equal
    edges = np.linspace(low - room, high + room, BINS + 1)
    return edges, bool(min(values) < edges[0] or max(values) > edges[-1])


def _scatter(points: Sequence[tuple[str, float, float]], against: str, xlabel: str, is_reward: bool) -> FigureSpec:
    """Return a scatter plot. points: (key, x, reward margin); of too many, those with the smallest keys are shown."""
    title, ylabel = ("Reward", "reward margin") if is_reward else ("Implicit reward", IMPLICIT)
    x, y = [at for _, at, _ in points], [reward for _, _, reward in points]
    correlation, shown = rank_correlation(x, y), sorted(points)[:POINTS]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.axhline(0, color=GREY, lw=0.8)
        axis.axvline(0, color=GREY, lw=0.8)
        axis.plot([p[1] for p in shown], [p[2] for p in shown], "o", color=BLUE, ms=3, alpha=0.4, mew=0)
        centres, means = _means(np.array(x), np.array(y))
        if len(centres) > 1:
            axis.plot(centres, means, "D-", color=ORANGE, mec="black", mew=0.6, ms=5, lw=1.6, label="means of tenths")
            axis.legend()
        text = (
            "no rank correlation: all values are equal"
            if correlation is None
            else f"rank correlation {_caption(correlation)}"
        )
        some = f", {len(shown):,} of them shown" if len(shown) < len(points) else ""
        heading = f"{title} against {against}\n{text}, n = {len(points):,}{some}"
        axis.set(title=heading, xlabel=xlabel, ylabel=ylabel)

    return FigureSpec(draw)


def _means(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean x and mean y of each tenth of the points by x; points of equal x stay together."""
    edges = np.unique(np.percentile(x, np.arange(10, 100, 10)))
    places = np.searchsorted(edges, x, side="right")
    filled = np.unique(places)
    return [float(x[places == at].mean()) for at in filled], [float(y[places == at].mean()) for at in filled]


def _caption(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{estimate.value:.2f}"
    low, high = estimate.interval
    return f"{estimate.value:.2f} (95 %: {low:.2f} to {high:.2f})"


def _head_room(axis: Any) -> None:
    """Leave space for the legend above the highest bar."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.25)
