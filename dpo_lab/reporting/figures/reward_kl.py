"""Arms on the plane of two metrics, reward and KL above all, with the attainable optimum."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_lab.reporting.figures.arm_lines import (
    Drawing,
    legend_of,
    lines_of,
    non_empty,
    of_two,
    shared_axis,
    style_of,
    tooltip,
)
from dpo_lab.reporting.figures.axes import Scale, Spacing, format_value
from dpo_lab.reporting.figures.markers import GREY, swatch
from dpo_lab.reporting.figures.svg import Panel, Point, Series, panel
from dpo_lab.stats.estimates import mean
from dpo_lab.studies import frontier
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.spec import Arm

NS = (2, 4, 8, 16, 32, 64)  # of best-of-n
WIDE_KL = 5.0  # nats; a KL axis beyond this is a square-root scale


def against(collection: RunSet, arms: Sequence[Arm], x: str, metrics: Sequence[str]) -> Drawing:
    """Return the figure of metrics against another metric, a line through arms that differ only along an axis."""
    axis = shared_axis(arms)
    panels, drawn = [], {}
    for metric in metrics:
        series = []
        for name, members in lines_of(arms, axis).items():
            named_by = axis if len(members) > 1 else ""
            points = [point for arm in members if (point := of_two(collection, arm, x, metric, named_by))]
            if points:
                series.append(Series(name, points, style_of(len(series)), is_line=len(points) > 1))
                drawn.setdefault(name, members)
        panels.append(panel(Panel(metric, x, series, height=340)))
    beside = f", labelled by {axis}" if axis else ""
    says = f"Means over seeds with their 95 % intervals{beside}."
    return Drawing(f"{', '.join(metrics)} against {x}", non_empty(panels), legend_of(drawn), says)


def reward_against_kl(collection: RunSet, arms: Sequence[Arm]) -> Drawing:
    """Return the figure of arms by gain and KL, with the optimum and best-of-n; without panels if not measured."""
    axis = shared_axis(arms)
    lines = lines_of(arms, axis) if axis else {arm.name: [arm] for arm in arms}
    series, drawn = [], {}
    for name, members in lines.items():
        points = [
            point
            for arm in members
            if (point := of_two(collection, arm, frontier.KL, frontier.GAIN, axis if len(members) > 1 else ""))
        ]
        if points:
            series.append(Series(name, points, style_of(len(series)), is_line=len(points) > 1))
            drawn[name] = members
    if not series:
        return Drawing("", ())
    most = max(high for s in series for p in s.points for high in (p.x, *(p.x_interval or ())))
    best, legend = _optimum(collection, max(1.0, most))
    reach = max(1.0, most) * 1.12
    spacing, how = spacing_of(frontier.KL, most)
    x_from = Scale(0.0, reach, spacing)
    shown = panel(
        Panel(
            "gain in gold reward, sd of the initial policy",
            f"KL to the initial policy, nats{how}",
            [*best, *series],
            spacing,
            x_from=x_from,
            height=340,
        )
    )
    says = (
        "Across: KL to the initial policy in nats; up: gain in gold reward, in sd of the initial policy. Means over seeds"
        + (f" with 95 % intervals, labelled by {axis}." if axis else " with 95 % intervals.")
    )
    no_optimum = "" if best else " No run sampled candidates of the initial policy, so the optimum is unknown."
    return Drawing("Reward against KL", [shown], [*legend_of(drawn), *legend], says + no_optimum)


def spacing_of(metric: str, most: float) -> tuple[Spacing, str]:
    """Return the spacing of the axis of a metric with values up to `most`, and a suffix for its title."""
    is_root = metric == frontier.KL and most > WIDE_KL
    return (Spacing.root, ", root scale") if is_root else (Spacing.linear, "")


def _optimum(collection: RunSet, most: float) -> tuple[list[Series], list[tuple[str, str]]]:
    """Return series and legend of the optimum, up to `most` nats, and of best-of-n; means over the seeds that have
    them.
    """
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
        (trusted, "5 3", "optimum: tilted samples of the initial policy"),
        (beyond, "1 3", f"optimum from under {frontier.TRUSTED:.0f} effective samples per prompt"),
    ):
        if len(points) > 1:
            template = "optimum: gain {}, KL {}, {:.0f} effective samples"
            tips = [
                Point(p.kl, p.gain, template.format(format_value(p.gain), format_value(p.kl), p.ess)) for p in points
            ]
            origin = [Point(0.0, 0.0)] if points is trusted else []
            series.append(Series(label, [*origin, *tips], GREY, has_markers=False, dash=dash))
            legend.append((swatch(GREY, dash=dash, has_marker=False), label))
    best = _best_of_n(collection, most)
    if best:
        series.append(Series("best of n", best, GREY, is_line=False))
        legend.append((swatch(GREY, is_line=False), "best of n of the initial policy, at an upper bound of its KL"))
    return series, legend


def _best_of_n(collection: RunSet, most: float) -> list[Point]:
    rewards = [found for seed in collection.seeds if (found := frontier.candidates(collection, seed)) is not None]
    if not rewards:
        return []
    ns = [n for n in NS if n <= min(each.shape[1] for each in rewards)]
    by_n = zip(ns, *(frontier.best_of_n(each, ns) for each in rewards), strict=True)
    points = []
    for n, *of_seeds in by_n:
        gain, kl = mean(p.gain for p in of_seeds), of_seeds[0].kl
        if kl <= most:
            points.append(Point(kl, gain.value, tooltip(f"best of {n}", "gain", gain), f"best of {n}"))
    return points
