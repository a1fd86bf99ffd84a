"""Arms on the plane of two metrics, reward and KL above all, with the attainable optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpo_lab.reporting.figures.arm_lines import CAPTION, label_of, lines_of, of_two, shared_axis, style_of, tooltip
from dpo_lab.reporting.figures.charts import GREY, Chart, Panel, Point, Series, chart
from dpo_lab.reporting.formatting import format_value
from dpo_lab.stats.estimates import mean
from dpo_lab.studies import frontier
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import axis_of
from dpo_lab.studies.spec import Arm

NS = (2, 4, 8, 16, 32, 64)  # of best-of-n


def against(collection: RunSet, arms: Sequence[Arm], x: str, metrics: Sequence[str]) -> Chart | None:
    """Return the chart of metrics against another metric, a line through arms that differ only along an axis."""
    axis = shared_axis(arms)
    lines = lines_of(arms, axis)
    panels = []
    for metric in metrics:
        series = _series(collection, lines, x, metric, axis)
        across, up = _values(series)
        panels.append(Panel(metric, x, series, axis_of(x, across), axis_of(metric, up)))
    return chart(f"{', '.join(metrics)} against {x}", panels, _caption(axis))


def reward_against_kl(collection: RunSet, arms: Sequence[Arm]) -> Chart | None:
    """Return the chart of arms by gain and KL, with the optimum and best-of-n; None if not measured."""
    axis = shared_axis(arms)
    lines = lines_of(arms, axis) if axis else {arm.name: [arm] for arm in arms}
    series = _series(collection, lines, frontier.KL, frontier.GAIN, axis)
    if not series:
        return None
    drifts, _ = _values(series)
    most = max(1.0, *drifts, *(high for s in series for p in s.points if p.x_interval for high in p.x_interval))
    best = optimum(collection, min(drifts), most)
    title, across = "gain in gold reward, sd of the initial policy", "KL to the initial policy, nats"
    panel = Panel(title, across, [*best, *series], x=axis_of(frontier.KL, drifts))
    caption = (
        f"Across: KL to the initial policy in nats; up: gain in gold reward, in sd of the initial policy. {_caption(axis)}"
        + ("" if best else " No run sampled candidates of the initial policy, so the optimum is unknown.")
    )
    return chart("Reward against KL", [panel], caption)


def _caption(axis: str) -> str:
    return f"{CAPTION} Labels: {axis}." if axis else CAPTION


def _values(series: Sequence[Series]) -> tuple[list[float], list[float]]:
    """Return the values across and up, of points and of single seeds."""
    places = [at for s in series for at in (*((p.x, p.y) for p in s.points), *s.cloud)]
    return [x for x, _ in places], [y for _, y in places]  # type: ignore[misc]


def _series(collection: RunSet, lines: Mapping[str, Sequence[Arm]], x: str, y: str, axis: str) -> list[Series]:
    """Return each line's arms as points of two metrics."""
    series = []
    for number, members in enumerate(lines.values()):
        named_by = axis if len(members) > 1 else ""
        points = [point for arm in members if (point := of_two(collection, arm, x, y, named_by))]
        if points:
            label = label_of(number, list(lines))
            cloud = [place for arm in members for place in _seeds(collection, arm, x, y)]
            series.append(Series(label, points, style_of(number), is_line=len(points) > 1, cloud=cloud))
    return series


def _seeds(collection: RunSet, arm: Arm, x: str, y: str) -> list[tuple[float, float]]:
    """Return an arm's single seeds by two metrics; empty if there is one."""
    across, up = (collection.values(arm.name, metric) for metric in (x, y))
    both = sorted(across.keys() & up.keys())
    return [(across[seed], up[seed]) for seed in both] if len(both) > 1 else []


def optimum(collection: RunSet, least: float, most: float) -> list[Series]:
    """Return the optimum, from under `least` to `most` nats, and best-of-n; means over the seeds that have them."""
    by_seed = [points for seed in collection.seeds if (points := frontier.optimum(collection, seed))]
    by_tilt = list(zip(*by_seed, strict=True)) if by_seed else []
    known = [
        frontier.Point(mean(p.gain for p in each).value, mean(p.kl for p in each).value, min(p.ess for p in each))
        for each in by_tilt
    ]
    inside = [point for point in sorted(known, key=lambda p: p.kl) if least / 2 <= point.kl <= most * 1.12]
    trusted = [p for p in inside if p.is_trusted]
    beyond = [*trusted[-1:], *(p for p in inside if not p.is_trusted)]
    series = []
    for points, dash, label in (
        (trusted, "5 3", "optimum: tilted samples of the initial policy"),
        (beyond, "1 3", f"optimum from under {frontier.TRUSTED:.0f} effective samples per prompt"),
    ):
        if len(points) > 1:
            template = "optimum: gain {}, KL {}, {:.0f} effective samples"
            tips = [
                Point(p.kl, p.gain, template.format(format_value(p.gain), format_value(p.kl), p.ess)) for p in points
            ]
            series.append(Series(label, tips, GREY, has_markers=False, dash=dash))
    if best := _best_of_n(collection, most):
        label = "best of n of the initial policy, at an upper bound of its KL"
        series.append(Series(label, best, GREY, is_line=False))
    return series


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
