"""The figures of a comparison: those its study asks for, reward against KL, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from dpo_lab.reporting.figures.arm_lines import CAPTION, label_of, lines_of, steps_along_axes, style_of, tooltip
from dpo_lab.reporting.figures.charts import GREY, STYLES, Chart, Panel, Point, Series, chart
from dpo_lab.reporting.figures.learning_curves import POINTS, thinned
from dpo_lab.reporting.figures.reward_kl import against, reward_against_kl
from dpo_lab.reporting.formatting import format_value
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import axis_of, mean_over_seeds
from dpo_lab.studies.spec import Arm, Figure, Kind

# Columns of the learning curves, a panel per row: the first column that was logged.
COLUMNS = (
    ("val/loss", "train/loss"),
    ("val/true/rewards/accuracies", "val/rewards/accuracies"),
    ("val/rewards/margins", "train/rewards/margins"),
    ("val/logratio/chosen",),
    ("train/rollout/gold", "train/rollout/reward"),
    ("train/rollout/kl",),
)
CURVE_POINTS = 2000  # of a panel of learning curves, shared by its arms
MARKS = 10  # most values of an axis with a tick each; with more, ticks are at round values
MetricsLogs = Callable[[str], Sequence[tuple[int, Sequence[Mapping[str, Any]]]]]  # arm -> (seed, rows)


def study_figures(collection: RunSet, metrics: Sequence[str], logs: MetricsLogs) -> list[Chart]:
    """Return the study's figures but that of all arms by reward and KL; without a study, a figure for each axis along which
    arms differ, or one by arm.
    """
    study = collection.study
    wanted = study.figures if study else _suggested(collection, metrics)
    charts = []
    for figure in wanted:
        arms = _arms(collection, figure.arms)
        if figure.kind is Kind.axis:
            is_axis = any(figure.x in arm.axes for arm in arms)
            charts.append((_along if is_axis else against)(collection, arms, figure.x, figure.y))
        elif figure.kind is Kind.arms:
            charts.append(_by_arm(collection, arms, figure.y))
        elif figure.kind is Kind.curves:
            charts.append(_curves(collection, arms, figure.y, logs))
        elif figure.arms:
            charts.append(reward_against_kl(collection, arms))
    return [found for found in charts if found]


def learning(collection: RunSet, logs: MetricsLogs) -> Chart | None:
    """Return the learning curves of all arms; None if nothing was logged."""
    logged = {name for arm in collection.arms for _, rows in logs(arm.name) for row in rows for name in row}
    columns = [found for names in COLUMNS if (found := next((n for n in names if n in logged), None))]
    return _curves(collection, collection.arms, columns, logs)


def _suggested(collection: RunSet, metrics: Sequence[str]) -> list[Figure]:
    """Return a figure for each axis along which arms differ in nothing else, three at most; of all arms if there is none."""
    figures = [Figure(Kind.axis, list(metrics[:4]), axis) for axis in steps_along_axes(collection.arms)]
    return figures[:3] or [Figure(Kind.arms, list(metrics[:4]))]


def _arms(collection: RunSet, named: Sequence[str]) -> list[Arm]:
    if not named:
        return list(collection.arms)
    return [arm for arm in collection.arms if any(arm in collection.members(name) for name in named)]


def _along(collection: RunSet, arms: Sequence[Arm], axis: str, metrics: Sequence[str]) -> Chart | None:
    placed = [arm for arm in arms if axis in arm.axes]
    marks = sorted({arm.axes[axis] for arm in placed})
    ticks = marks if len(marks) <= MARKS else ()
    is_log = bool(marks) and marks[0] > 0 and marks[-1] / marks[0] >= 8
    lines = lines_of(placed, axis)
    panels = []
    for metric in metrics:
        series = []
        for number, members in enumerate(lines.values()):
            points, cloud = [], []
            for arm in members:
                if values := list(collection.values(arm.name, metric).values()):
                    estimate, x = mean_over_seeds(metric, values), arm.axes[axis]
                    tip = tooltip(arm.name, metric, estimate)
                    points.append(Point(x, estimate.value, tip, y_interval=estimate.interval))
                    cloud += [(x, value) for value in values]
            label, is_line = label_of(number, list(lines)), len(points) > 1
            shift = _beside(number, len(lines))
            series.append(Series(label, points, style_of(number), is_line, cloud=cloud, shift=shift))
        up = axis_of(metric, [value for s in series for _, value in s.cloud])
        panels.append(Panel(metric, axis, series, "log" if is_log else "linear", up, ticks))
    return chart(f"{', '.join(metrics)} along {axis}", panels, CAPTION)


def _by_arm(collection: RunSet, arms: Sequence[Arm], metrics: Sequence[str]) -> Chart | None:
    groups = list(dict.fromkeys(arm.group for arm in arms))
    panels = []
    for metric in metrics:
        base = list(collection.values(collection.baseline, metric).values()) if collection.baseline else []
        series = []
        for number, group in enumerate(groups):
            points, cloud = [], []
            for arm in arms:
                values = list(collection.values(arm.name, metric).values())
                if values and arm.group == group:
                    estimate = mean_over_seeds(metric, values)
                    tip = tooltip(arm.name, metric, estimate)
                    points.append(Point(estimate.value, arm.name, tip, x_interval=estimate.interval))
                    cloud += [(value, arm.name) for value in values]
            series.append(Series(group, points, style_of(number), is_line=False, cloud=cloud))
        dashed = [mean_over_seeds(metric, base).value] if base else []
        across = axis_of(metric, [value for s in series for value, _ in s.cloud])
        panels.append(Panel(metric, metric, series, x=across, dashed=dashed, rows=[arm.name for arm in arms]))
    baseline = f" Dashed: {collection.baseline}." if collection.baseline else ""
    return chart(f"{', '.join(metrics)} by arm", panels, CAPTION + baseline)


def _beside(number: int, of: int) -> float:
    """Return a shift to the right in px that separates lines at the same x; 0 if there are too many lines."""
    return 5.0 * (number - (of - 1) / 2) if of <= STYLES else 0.0


def _curves(collection: RunSet, arms: Sequence[Arm], columns: Sequence[str], logs: MetricsLogs) -> Chart | None:
    ordered = sorted(arms, key=lambda arm: arm.name != collection.baseline)
    names = [arm.name for arm in ordered]
    limit = max(50, min(CURVE_POINTS // max(1, len(ordered)), POINTS))
    panels, most = [], 1
    for column in columns:
        series = []
        for number, arm in enumerate(ordered):
            by_step: dict[int, list[float]] = {}
            for _, logged in logs(arm.name):
                for row in logged:
                    if column in row and math.isfinite(row[column]):
                        by_step.setdefault(row["step"], []).append(float(row[column]))
            if not by_step:
                continue
            steps = sorted(by_step)
            (x, y, of_each), (_, low, _), (_, high, _) = (
                thinned(steps, [of(by_step[step]) for step in steps], limit) for of in (fmean, min, max)
            )
            is_line, style = len(x) > 1, style_of(number)  # logged once: a point instead of a line
            spans = [None] * len(x) if style == GREY and is_line else list(zip(low, high, strict=True))
            points = [Point(at, value, y_interval=span) for at, value, span in zip(x, y, spans, strict=True)]
            points[-1] = replace(points[-1], tip=f"{arm.name}: {column} {format_value(y[-1])} at step {x[-1]:g}")
            most = max(most, of_each)
            label, shift = label_of(number, names), 0.0 if is_line else _beside(number, len(ordered))
            series.append(
                Series(label, points, style, is_line, not is_line, has_band=is_line, shift=shift, arm=arm.name)
            )
        panels.append(Panel(column, "optimizer steps", series[::-1]))
    averaged = f" Points are means of up to {most} logged values." if most > 1 else ""
    caption = "Lines: means over seeds; bands: from the lowest seed to the highest."
    return chart("Learning curves", panels, caption + averaged)
