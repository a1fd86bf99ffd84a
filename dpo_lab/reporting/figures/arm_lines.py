"""What the figures of a comparison share: the line of an arm, its style, its label, its tooltip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dpo_lab.reporting.comparison import interval_text
from dpo_lab.reporting.figures.charts import GREY, STYLES, Point
from dpo_lab.reporting.formatting import format_short
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.grouping import DEFAULT_ARM
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import mean_over_seeds
from dpo_lab.studies.spec import Arm

CAPTION = (
    "Large points: means over seeds with 95 % intervals (Student's t; of ratio quantities such as KL geometric means);"
    " small points: single seeds."
)


def line_of(arm: Arm, axis: str) -> str:
    """Return the name that arms differing only along an axis share: the group, or the name without the axis."""
    rest = [part for part in arm.name.split(", ") if part != DEFAULT_ARM and not part.startswith(f"{axis}=")]
    return arm.group or ", ".join(rest) or "all runs"


def lines_of(arms: Iterable[Arm], axis: str) -> dict[str, list[Arm]]:
    """Return the arms of each line, ordered along the axis; a group that has two arms at one place is several lines."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(line_of(arm, axis), []).append(arm)
    lines: dict[str, list[Arm]] = {}
    for name, members in groups.items():
        places = [arm.axes[axis] for arm in members if axis in arm.axes]
        varied = []
        if len(places) > len(set(places)):
            others = sorted({key for arm in members for key in arm.axes} - {axis})
            varied = [key for key in others if len({arm.axes.get(key) for arm in members}) > 1]
        for arm in members:
            rest = [f"{key}={format_short(arm.axes[key])}" for key in varied if key in arm.axes]
            lines.setdefault(", ".join([name, *rest]), []).append(arm)
    return {name: sorted(members, key=lambda arm: arm.axes.get(axis, math.inf)) for name, members in lines.items()}


def style_of(number: int) -> int | str:
    """Return the style of line number `number`; grey after the last distinct one."""
    return number if number < STYLES else GREY


def tooltip(of: str, what: str, estimate: Estimate) -> str:
    """Return the tooltip of an estimate of an arm."""
    return f"{of}: {what} {interval_text(estimate)}, n = {estimate.n}"


def shared_axis(arms: Sequence[Arm]) -> str:
    """Return the axis along which most arms of a line differ; empty if there is none."""
    counts = steps_along_axes(arms)
    return max(counts, key=counts.__getitem__, default="")


def steps_along_axes(arms: Sequence[Arm]) -> dict[str, int]:
    """Return, for each axis along which arms of one line differ, the number of steps from one value to the next."""
    counts = {}
    for axis in sorted({name for arm in arms for name in arm.axes}):
        lines = lines_of([arm for arm in arms if axis in arm.axes], axis).values()
        counts[axis] = sum(len({arm.axes[axis] for arm in line}) - 1 for line in lines)
    return {axis: count for axis, count in counts.items() if count > 0}


def of_two(collection: RunSet, arm: Arm, x: str, y: str, axis: str) -> Point | None:
    """Return an arm as a point by two metrics, over the seeds with both, named by its value on the axis or by the arm.

    None if no seed has both metrics.
    """
    across, up = (collection.values(arm.name, metric) for metric in (x, y))
    if not (both := sorted(across.keys() & up.keys())):
        return None
    right, high = (
        mean_over_seeds(metric, [values[seed] for seed in both]) for metric, values in ((x, across), (y, up))
    )
    tip = f"{tooltip(arm.name, y, high)}; {x} {interval_text(right)}"
    name = format_short(arm.axes[axis]) if axis in arm.axes else arm.name
    return Point(right.value, high.value, tip, name, x_interval=right.interval, y_interval=high.interval)


def label_of(number: int, names: Sequence[str]) -> str:
    """Return the legend's label of line number `number`; lines in grey share one."""
    return names[number] if number < STYLES else f"{len(names) - STYLES} more"
