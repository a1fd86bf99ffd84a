"""Trajectories as figures: reward against KL as a path with its steps, and both over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_lab.reporting.figures.arm_lines import label_of, style_of
from dpo_lab.reporting.figures.charts import Chart, Panel, Point, Series, chart
from dpo_lab.reporting.figures.reward_kl import optimum
from dpo_lab.reporting.figures.style import BLUE, GREEN, GREY, VERMILLION, FigureSpec
from dpo_lab.reporting.formatting import format_value
from dpo_lab.runs.metrics_log import MetricsLogError
from dpo_lab.runs.trajectory import REWARDS
from dpo_lab.studies.frontier import GAIN as GOLD
from dpo_lab.studies.run_data import RunData, RunSet

LINES = {"gold": ("-o", BLUE), "reward": ("--s", VERMILLION), "judge": (":^", GREEN)}
PATHS = 40  # most with a marker at each point
NAMED = 2  # most paths whose points are named by their steps
LEAST_KL = 1e-3  # nats; what is less, as at the first step, is not shown on a log axis
WIDTH, HEIGHT = 4.4, 3.2  # of a panel, inches
STEPS, KL, GAIN = "optimizer steps", "KL to the initial policy, nats", "gain over the initial policy, in its sd"


def trajectory(points: Sequence[Mapping[str, float]]) -> FigureSpec | None:
    """Return the figure of a run's trajectory, its points in the order of steps; None if there are fewer than two."""
    if len(points) < 2:
        return None
    gains = [f"{name}_gain" for name in REWARDS if any(f"{name}_gain" in point for point in points)]
    last = "well_formed" if any("well_formed" in point for point in points) else "length"
    panels: list[tuple[str, list[str], str, str]] = [("step", ["kl"], STEPS, KL)]
    if gains:
        panels = [("kl", gains, KL, GAIN), *panels, ("step", gains, STEPS, GAIN)]
    panels.append(
        ("step", [last], STEPS, "share of well-formed samples" if last == "well_formed" else "tokens of a sample")
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(panels) // 2, 2, squeeze=False).flat
        for axis, (across, names, xlabel, ylabel) in zip(axes, panels, strict=True):
            for name in names:
                _line(axis, points, across, name)
            axis.axhline(0, color=GREY, lw=0.8)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            if len(names) > 1:
                axis.legend()

    return FigureSpec(draw, (WIDTH * 2, HEIGHT * len(panels) // 2))


def _line(axis: Any, points: Sequence[Mapping[str, float]], across: str, name: str) -> None:
    shown = [point for point in points if across in point and name in point]
    look, colour = LINES.get(name.removesuffix("_gain"), ("-o", BLUE))
    axis.plot([p[across] for p in shown], [p[name] for p in shown], look, color=colour, ms=3.5, lw=1.3, label=name)
    for point in shown if across != "step" else ():
        at = (point[across], point[name])
        axis.annotate(str(point["step"]), at, (3, 3), textcoords="offset points", fontsize=7, color=colour)


def paths(collection: RunSet) -> list[Chart]:
    """Return the chart of gain against KL along the trajectory of each run that has one, with the optimum's line, and over
    steps.
    """
    of_run = {(run.arm, run.seed): found for run in collection.runs if (found := _path(run))}
    charts = []
    for gain in (f"{name}_gain" for name in REWARDS):
        plane = _series(collection, of_run, "kl", gain)
        drifts = [point.x for of in plane for point in of.points]
        if not drifts:
            continue
        best = optimum(collection, min(drifts), max(drifts)) if gain == GOLD else []
        panels = [
            Panel(gain, "KL to the initial policy, nats", [*best, *plane], x="log"),
            Panel(gain, STEPS, _series(collection, of_run, "step", gain)),
            Panel("kl", STEPS, _series(collection, of_run, "step", "kl")),
        ]
        caption = "A line is a run, a point one of its trajectory; gains are in sd of the initial policy's rewards."
        caption += f" Points under {LEAST_KL:g} nats are left out of the first panel."
        if found := chart(f"Trajectories, {gain}", panels, caption):
            charts.append(found)
    return charts


def _path(run: RunData) -> list[dict[str, Any]]:
    """Return the points of a run's trajectory; empty if its metrics log is damaged, as its learning curves say."""
    try:
        return run.trajectory()
    except MetricsLogError:
        return []


def _series(
    collection: RunSet, of_run: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], x: str, y: str
) -> list[Series]:
    names, series = [arm.name for arm in collection.arms], []
    for number, arm in enumerate(names):
        for (of_arm, seed), path in of_run.items():
            if of_arm != arm:
                continue
            shown = [point for point in path if x in point and y in point and (x == "step" or point[x] >= LEAST_KL)]
            points = [Point(float(point[x]), point[y]) for point in shown]
            if x != "step":
                points = [
                    _named(of, at, f"{arm}, seed {seed}", y, len(of_run) <= NAMED)
                    for of, at in zip(points, shown, strict=True)
                ]
            label = label_of(number, names)
            series.append(Series(label, points, style_of(number), has_markers=len(of_run) <= PATHS, arm=arm))
    return series


def _named(point: Point, of: Mapping[str, Any], run: str, gain: str, is_named: bool) -> Point:
    """Return a point of gain against KL with its tooltip and, if it is to be named, its step."""
    tip = f"{run}, step {of['step']}: {gain} {format_value(of[gain])}, kl {format_value(of['kl'])}"
    return replace(point, tip=tip, name=str(of["step"]) if is_named else "")
