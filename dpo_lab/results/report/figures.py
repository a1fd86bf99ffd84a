"""The figures of a collection: those that its study asks for, the frontier of reward against KL, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lab.results import frontier
from dpo_lab.results.estimates import Estimate, mean
from dpo_lab.results.facts import Collection
from dpo_lab.results.figures.curves import thinned
from dpo_lab.results.report.drawing import Panel, Point, Series, panel
from dpo_lab.results.report.marks import GREY, LOOKS, swatch
from dpo_lab.results.report.numbers import interval_text
from dpo_lab.results.report.rows import Row, rows
from dpo_lab.results.report.scales import Scale, Spacing, short, spelled
from dpo_lab.results.study import Arm, Figure, Kind

# What the learning curves show, of each line the first that was logged.
COLUMNS = (
    ("val/loss", "train/loss"),
    ("val/true/rewards/accuracies", "val/rewards/accuracies"),
    ("val/rewards/margins", "train/rewards/margins"),
    ("val/logratio/chosen",),
)
NS = (2, 4, 8, 16, 32, 64)  # of best-of-n
MARKS = 10  # values of an axis that have a tick each; of more, round ones are marked
WIDE_KL = 5.0  # nats, from where an axis of KL is a root
Journals = Callable[[str], Sequence[tuple[int, Sequence[Mapping[str, Any]]]]]  # arm -> (seed, rows)


@dataclass(frozen=True)
class Drawing:
    """A figure: panels of SVG side by side, one legend of (swatch, label), and a sentence on how to read it."""

    title: str
    panels: Sequence[str]
    legend: Sequence[tuple[str, str]] = ()
    says: str = ""


def asked(collection: Collection, metrics: Sequence[str], journals: Journals) -> list[Drawing]:
    """The figures of the study; of runs without one a figure for each axis along which they differ, or for the arms."""
    study = collection.study
    wanted = study.figures if study else _suggested(collection, metrics)
    drawn = []
    for figure in wanted:
        arms = _arms(collection, figure.arms)
        if figure.kind is Kind.axis:
            drawn.append(_along(collection, arms, figure.x, figure.y))
        elif figure.kind is Kind.arms:
            drawn.append(_by_arm(collection, arms, figure.y))
        elif figure.kind is Kind.curves:
            drawn.append(_curves(collection, arms, figure.y, journals))
        else:
            drawn.append(_frontier(collection, arms))
    return [drawing for drawing in drawn if drawing.panels]


def reward_against_kl(collection: Collection) -> Drawing | None:
    """Every arm on the plane of reward and KL; None where these were not measured, or the study's own figures show it."""
    study = collection.study
    if study and any(figure.kind is Kind.frontier and not figure.arms for figure in study.figures):
        return None
    drawing = _frontier(collection, collection.arms)
    return drawing if drawing.panels else None


def learning(collection: Collection, journals: Journals) -> Drawing | None:
    """The learning curves of all arms; None where nothing was logged."""
    logged = {name for arm in collection.arms for _, rows in journals(arm.name) for row in rows for name in row}
    columns = [found for names in COLUMNS if (found := next((n for n in names if n in logged), None))]
    drawing = _curves(collection, collection.arms, columns, journals)
    return drawing if drawing.panels else None


def _suggested(collection: Collection, metrics: Sequence[str]) -> list[Figure]:
    axes = {
        name: {arm.at[name] for arm in collection.arms if name in arm.at} for arm in collection.arms for name in arm.at
    }
    figures = [Figure(Kind.axis, list(metrics[:4]), name) for name, values in sorted(axes.items()) if len(values) > 1]
    return figures[:3] or [Figure(Kind.arms, list(metrics[:4]))]


def _arms(collection: Collection, named: Sequence[str]) -> list[Arm]:
    if not named:
        return list(collection.arms)
    return [arm for arm in collection.arms if any(arm in collection.members(name) for name in named)]


def line_of(arm: Arm, axis: str) -> str:
    """What an arm shares with those that differ from it along an axis alone: its group, or the rest of its name."""
    rest = [part for part in arm.name.split(", ") if not part.startswith(f"{axis}=")]
    return arm.group or ", ".join(rest) or "all runs"


def _lines(arms: Iterable[Arm], axis: str) -> dict[str, list[Arm]]:
    lines: dict[str, list[Arm]] = {}
    for arm in arms:
        lines.setdefault(line_of(arm, axis), []).append(arm)
    return {name: sorted(members, key=lambda arm: arm.at.get(axis, math.inf)) for name, members in lines.items()}


def look_of(number: int) -> int | str:
    return number if number < LOOKS else GREY


def _told(of: str, what: str, estimate: Estimate) -> str:
    return f"{of}: {what} {interval_text(estimate)}, n = {estimate.n}"


def _along(collection: Collection, arms: Sequence[Arm], axis: str, metrics: Sequence[str]) -> Drawing:
    placed = [arm for arm in arms if axis in arm.at]
    marks = sorted({arm.at[axis] for arm in placed})
    shown = marks if len(marks) <= MARKS else []
    is_log = bool(marks) and marks[0] > 0 and marks[-1] / marks[0] >= 8
    lines = _lines(placed, axis)
    panels = []
    for metric in metrics:
        series = []
        for number, (name, members) in enumerate(lines.items()):
            points, cloud = [], []
            for arm in members:
                if values := list(collection.values(arm.name, metric).values()):
                    estimate, x = mean(values), arm.at[axis]
                    points.append(
                        Point(x, estimate.value, _told(arm.name, metric, estimate), y_interval=estimate.interval)
                    )
                    cloud += [(x, value) for value in values]
            shift = 5.0 * (number - (len(lines) - 1) / 2) if len(lines) <= LOOKS else 0.0
            series.append(Series(name, points, look_of(number), cloud=cloud, shift=shift))
        panels.append(panel(Panel(metric, axis, series, Spacing.log if is_log else Spacing.linear, marks=shown)))
    return Drawing(f"{', '.join(metrics)} along {axis}", _there(panels), _legend(lines), _SEEDS)


_SEEDS = "Large points: means over seeds with their 95 % interval (Student's t); small ones: the seeds."


def _by_arm(collection: Collection, arms: Sequence[Arm], metrics: Sequence[str]) -> Drawing:
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
            says = _told(arm.name, metric, estimate)
            rows_of.append(
                Row(arm.name, estimate.value, estimate.interval, values, look_of(groups.index(arm.group)), says)
            )
        panels.append(rows(metric, metric, rows_of, mean(base).value if base else None))
    legend = [(swatch(look_of(i), is_line=False), group) for i, group in enumerate(groups) if group]
    dashed = f" Dashed: {collection.baseline}." if collection.baseline else ""
    return Drawing(f"{', '.join(metrics)} by arm", _there(panels), legend, _SEEDS + dashed)


def _frontier(collection: Collection, arms: Sequence[Arm]) -> Drawing:
    axis = _shared_axis(arms)
    lines = _lines(arms, axis) if axis else {arm.name: [arm] for arm in arms}
    series, drawn = [], {}
    for name, members in lines.items():
        points = [point for arm in members if (point := _on_plane(collection, arm, axis if len(members) > 1 else ""))]
        if points:
            series.append(Series(name, points, look_of(len(series)), is_line=len(points) > 1))
            drawn[name] = members
    if not series:
        return Drawing("", ())
    most = max(high for s in series for p in s.points for high in (p.x, *(p.x_interval or ())))
    best, legend = _optimum(collection, max(1.0, most))
    reach = max(1.0, most) * 1.12
    spacing = Spacing.root if most > WIDE_KL else Spacing.linear
    how = ", root scale" if spacing is Spacing.root else ""
    x_from = Scale(0.0, reach, spacing)
    shown = panel(
        Panel(
            "gain in gold reward, sd of the initial policy's",
            f"KL to the initial policy, nats{how}",
            [*best, *series],
            spacing,
            x_from=x_from,
            height=340,
        )
    )
    says = (
        "Across: KL to the initial policy in nats; up: gain in gold reward, in the initial policy's sd. Means over seeds"
        + (f" with 95 % intervals, {axis} beside them." if axis else " with 95 % intervals.")
    )
    no_optimum = (
        "" if best else " No run kept candidates of the initial policy, so the optimum's line is not known here."
    )
    return Drawing("Reward against KL", [shown], [*_legend(drawn), *legend], says + no_optimum)


def _shared_axis(arms: Sequence[Arm]) -> str:
    """The axis along which most arms of a line differ; empty where there is none."""
    counts = {
        axis: sum(
            len({arm.at[axis] for arm in members if axis in arm.at}) - 1 for members in _lines(arms, axis).values()
        )
        for axis in sorted({name for arm in arms for name in arm.at})
    }
    best = max(counts, key=counts.__getitem__, default="")
    return best if counts.get(best, 0) > 0 else ""


def _on_plane(collection: Collection, arm: Arm, axis: str) -> Point | None:
    gains, kls = (collection.values(arm.name, metric) for metric in (frontier.GAIN, frontier.KL))
    if not (both := sorted(gains.keys() & kls.keys())):
        return None
    gain, kl = mean(gains[seed] for seed in both), mean(kls[seed] for seed in both)
    says = f"{_told(arm.name, 'gain', gain)}; KL {interval_text(kl)}"
    name = short(arm.at[axis]) if axis in arm.at else arm.name
    return Point(kl.value, gain.value, says, name, x_interval=kl.interval, y_interval=gain.interval)


def _optimum(collection: Collection, most: float) -> tuple[list[Series], list[tuple[str, str]]]:
    """The optimum's line, up to so many nats, and best-of-n; means over the seeds that know it."""
    by_seed = [points for seed in collection.seeds if (points := frontier.optimum(collection, seed))]
    by_tilt = list(zip(*by_seed, strict=True)) if by_seed else []
    known = [
        frontier.Point(mean(p.gain for p in each).value, mean(p.kl for p in each).value, min(p.ess for p in each))
        for each in by_tilt
    ]
    inside = [point for point in sorted(known, key=lambda p: p.kl) if point.kl <= most * 1.12]
    trusted = [p for p in inside if p.is_trusted]
    beyond = [*trusted[-1:], *(p for p in inside if not p.is_trusted)]
    series, legend = [], []
    for points, dash, label in (
        (trusted, "5 3", "optimum: the initial policy's samples, tilted"),
        (beyond, "1 3", f"the same, from under {frontier.TRUSTED:.0f} effective samples a prompt"),
    ):
        if len(points) > 1:
            tips = [Point(p.kl, p.gain, f"optimum: gain {spelled(p.gain)}, KL {spelled(p.kl)}, {p.ess:.0f} effective samples")
                    for p in points]  # fmt: skip
            origin = [Point(0.0, 0.0)] if points is trusted else []
            series.append(Series(label, [*origin, *tips], GREY, has_markers=False, dash=dash))
            legend.append((swatch(GREY, dash=dash, has_marker=False), label))
    best = _best_of_n(collection, most)
    if best:
        series.append(Series("best of n", best, GREY, is_line=False))
        legend.append((swatch(GREY, is_line=False), "best of n of the initial policy, at the KL that bounds its own"))
    return series, legend


def _best_of_n(collection: Collection, most: float) -> list[Point]:
    rewards = [found for seed in collection.seeds if (found := frontier.candidates(collection, seed)) is not None]
    if not rewards:
        return []
    ns = [n for n in NS if n <= min(each.shape[1] for each in rewards)]
    by_n = zip(ns, *(frontier.best_of_n(each, ns) for each in rewards), strict=True)
    points = []
    for n, *of_seeds in by_n:
        gain, kl = mean(p.gain for p in of_seeds), of_seeds[0].kl
        if kl <= most:
            points.append(Point(kl, gain.value, _told(f"best of {n}", "gain", gain), f"best of {n}"))
    return points


def _curves(collection: Collection, arms: Sequence[Arm], columns: Sequence[str], journals: Journals) -> Drawing:
    ordered = sorted(arms, key=lambda arm: arm.name != collection.baseline)
    panels, names, most = [], [arm.name for arm in ordered], 1
    for column in columns:
        series = []
        for number, arm in enumerate(ordered):
            by_step: dict[int, list[float]] = {}
            for _, logged in journals(arm.name):
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
            look = look_of(number)
            band = list(zip(x, low, high, strict=True)) if look != GREY else []
            points = [Point(a, b) for a, b in zip(x, y, strict=True)]
            series.append(Series(arm.name, points, look, has_markers=False, band=band))
        panels.append(panel(Panel(column, "optimizer steps", series[::-1])))
    legend = [(swatch(i, has_marker=False), name) for i, name in enumerate(names[:LOOKS])]
    if len(names) > LOOKS:
        legend.append(
            (
                swatch(GREY, has_marker=False),
                "another arm" if len(names) == LOOKS + 1 else f"{len(names) - LOOKS} other arms",
            )
        )
    says = "Lines: means over seeds; bands: from the lowest seed to the highest."
    averaged = f" Points are means of up to {most} logged ones." if most > 1 else ""
    return Drawing("Learning curves", _there(panels), legend, says + averaged)


def _legend(lines: Mapping[str, Sequence[Arm]]) -> list[tuple[str, str]]:
    if len(lines) < 2:
        return []
    first = [(swatch(i, is_line=len(arms) > 1), name) for i, (name, arms) in enumerate(lines.items()) if i < LOOKS]
    more = [(swatch(GREY), f"{len(lines) - LOOKS} others")] if len(lines) > LOOKS else []
    return first + more


def _there(panels: Iterable[str]) -> list[str]:
    return [each for each in panels if each]
