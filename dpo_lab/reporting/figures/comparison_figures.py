"""The figures of a comparison: those its study asks for, reward against KL, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_lab.reporting.figures.arm_lines import Drawing, legend_of, lines_of, non_empty, style_of, tooltip
from dpo_lab.reporting.figures.axes import Spacing
from dpo_lab.reporting.figures.interval_rows import Row, rows
from dpo_lab.reporting.figures.learning_curves import thinned
from dpo_lab.reporting.figures.markers import GREY, STYLES, swatch
from dpo_lab.reporting.figures.reward_kl import against, reward_against_kl, spacing_of
from dpo_lab.reporting.figures.svg import Panel, Point, Series, panel
from dpo_lab.stats.estimates import mean
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.spec import Arm, Figure, Kind

# Columns of the learning curves, a panel per row: the first column that was logged.
COLUMNS = (
    ("val/loss", "train/loss"),
    ("val/true/rewards/accuracies", "val/rewards/accuracies"),
    ("val/rewards/margins", "train/rewards/margins"),
    ("val/logratio/chosen",),
)
MARKS = 10  # most values of an axis with a tick each; with more, ticks are at round values
MetricsLogs = Callable[[str], Sequence[tuple[int, Sequence[Mapping[str, Any]]]]]  # arm -> (seed, rows)


def study_figures(collection: RunSet, metrics: Sequence[str], logs: MetricsLogs) -> list[Drawing]:
    """Return the study's figures; without a study, a figure for each axis along which arms differ, or one by arm."""
    study = collection.study
    wanted = study.figures if study else _suggested(collection, metrics)
    drawings = []
    for figure in wanted:
        arms = _arms(collection, figure.arms)
        if figure.kind is Kind.axis:
            is_axis = any(figure.x in arm.axes for arm in arms)
            drawings.append((_along if is_axis else against)(collection, arms, figure.x, figure.y))
        elif figure.kind is Kind.arms:
            drawings.append(_by_arm(collection, arms, figure.y))
        elif figure.kind is Kind.curves:
            drawings.append(_curves(collection, arms, figure.y, logs))
        else:
            drawings.append(reward_against_kl(collection, arms))
    return [drawing for drawing in drawings if drawing.panels]


def reward_kl_figure(collection: RunSet) -> Drawing | None:
    """Return the figure of all arms by reward and KL; None if these were not measured, or if the study has this figure."""
    study = collection.study
    if study and any(figure.kind is Kind.frontier and not figure.arms for figure in study.figures):
        return None
    drawing = reward_against_kl(collection, collection.arms)
    return drawing if drawing.panels else None


def learning(collection: RunSet, logs: MetricsLogs) -> Drawing | None:
    """Return the learning curves of all arms; None if nothing was logged."""
    logged = {name for arm in collection.arms for _, rows in logs(arm.name) for row in rows for name in row}
    columns = [found for names in COLUMNS if (found := next((n for n in names if n in logged), None))]
    drawing = _curves(collection, collection.arms, columns, logs)
    return drawing if drawing.panels else None


def _suggested(collection: RunSet, metrics: Sequence[str]) -> list[Figure]:
    axes = {
        name: {arm.axes[name] for arm in collection.arms if name in arm.axes}
        for arm in collection.arms
        for name in arm.axes
    }
    figures = [Figure(Kind.axis, list(metrics[:4]), name) for name, values in sorted(axes.items()) if len(values) > 1]
    return figures[:3] or [Figure(Kind.arms, list(metrics[:4]))]


def _arms(collection: RunSet, named: Sequence[str]) -> list[Arm]:
    if not named:
        return list(collection.arms)
    return [arm for arm in collection.arms if any(arm in collection.members(name) for name in named)]


def _along(collection: RunSet, arms: Sequence[Arm], axis: str, metrics: Sequence[str]) -> Drawing:
    placed = [arm for arm in arms if axis in arm.axes]
    marks = sorted({arm.axes[axis] for arm in placed})
    shown = marks if len(marks) <= MARKS else []
    is_log = bool(marks) and marks[0] > 0 and marks[-1] / marks[0] >= 8
    lines = lines_of(placed, axis)
    panels = []
    for metric in metrics:
        series = []
        for number, (name, members) in enumerate(lines.items()):
            points, cloud = [], []
            for arm in members:
                if values := list(collection.values(arm.name, metric).values()):
                    estimate, x = mean(values), arm.axes[axis]
                    points.append(
                        Point(x, estimate.value, tooltip(arm.name, metric, estimate), y_interval=estimate.interval)
                    )
                    cloud += [(x, value) for value in values]
            shift = _beside(number, len(lines))
            series.append(Series(name, points, style_of(number), cloud=cloud, shift=shift))
        across = Spacing.log if is_log else Spacing.linear
        up, how = spacing_of(metric, max((value for s in series for _, value in s.cloud), default=0.0))
        panels.append(panel(Panel(f"{metric}{how}", axis, series, across, up, marks=shown)))
    return Drawing(f"{', '.join(metrics)} along {axis}", non_empty(panels), legend_of(lines), _SEEDS)


_SEEDS = "Large points: means over seeds with 95 % intervals (Student's t); small points: single seeds."


def _by_arm(collection: RunSet, arms: Sequence[Arm], metrics: Sequence[str]) -> Drawing:
    groups = list(dict.fromkeys(arm.group for arm in arms))
    panels = []
    for metric in metrics:
        base = list(collection.values(collection.baseline, metric).values()) if collection.baseline else []
        rows_of = []
        for arm in arms:
            values = list(collection.values(arm.name, metric).values())
            if not values:
                rows_of.append(Row(arm.name, None))
                continue
            estimate = mean(values)
            says = tooltip(arm.name, metric, estimate)
            rows_of.append(
                Row(arm.name, estimate.value, estimate.interval, values, style_of(groups.index(arm.group)), says)
            )
        panels.append(rows(metric, metric, rows_of, mean(base).value if base else None))
    legend = [(swatch(style_of(i), is_line=False), group) for i, group in enumerate(groups) if group]
    dashed = f" Dashed: {collection.baseline}." if collection.baseline else ""
    return Drawing(f"{', '.join(metrics)} by arm", non_empty(panels), legend, _SEEDS + dashed)


def _beside(number: int, of: int) -> float:
    """Return a shift to the right in px that separates lines at the same x; 0 if there are too many lines."""
    return 5.0 * (number - (of - 1) / 2) if of <= STYLES else 0.0


def _curves(collection: RunSet, arms: Sequence[Arm], columns: Sequence[str], logs: MetricsLogs) -> Drawing:
    ordered = sorted(arms, key=lambda arm: arm.name != collection.baseline)
    panels, names, most = [], [arm.name for arm in ordered], 1
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
            x, y, of_each = thinned(steps, [math.fsum(by_step[s]) / len(by_step[s]) for s in steps])
            _, low, _ = thinned(steps, [min(by_step[s]) for s in steps])
            _, high, _ = thinned(steps, [max(by_step[s]) for s in steps])
            most = max(most, of_each)
            style = style_of(number)
            spans = list(zip(low, high, strict=True))
            if len(x) == 1:  # logged once: a point instead of a line
                points = [Point(x[0], y[0], y_interval=spans[0])]
                series.append(Series(arm.name, points, style, shift=_beside(number, len(ordered))))
                continue
            band = [(at, *span) for at, span in zip(x, spans, strict=True)] if style != GREY else []
            points = [Point(a, b) for a, b in zip(x, y, strict=True)]
            series.append(Series(arm.name, points, style, has_markers=False, band=band))
        panels.append(panel(Panel(column, "optimizer steps", series[::-1])))
    legend = [(swatch(i, has_marker=False), name) for i, name in enumerate(names[:STYLES])]
    if len(names) > STYLES:
        legend.append(
            (
                swatch(GREY, has_marker=False),
                "another arm" if len(names) == STYLES + 1 else f"{len(names) - STYLES} other arms",
            )
        )
    says = "Lines: means over seeds; bands: from the lowest seed to the highest."
    averaged = f" Points are means of up to {most} logged values." if most > 1 else ""
    return Drawing("Learning curves", non_empty(panels), legend, says + averaged)
