"""A run's metric at an equal gain: where its trajectory first comes to a value of another metric, interpolated.

After Rafailov et al. 2023 (arXiv:2305.18290, figure 2), who compare policies by the path of reward against KL.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AT = re.compile(r"(?P<metric>\S+) at (?P<name>\S+) (?P<value>-?\d+(\.\d*)?(e-?\d+)?)")  # kl at gold_gain 0.9


@dataclass(frozen=True)
class Crossing:
    """Where a trajectory first has `value` of a metric: the step, and the other metric there, both interpolated.

    closest: if it never has it, and so is censored, the value that came closest; step and metric are those there.
    """

    step: float
    metric: float
    closest: float | None = None

    @property
    def is_censored(self) -> bool:
        """Whether the trajectory never came to the value."""
        return self.closest is not None


def crossing(points: Sequence[Mapping[str, float]], metric: str, name: str, value: float) -> Crossing | None:
    """Return where the metric `name` of the points first equals `value`; None if no point has both metrics.

    Between two neighbouring points both metrics are taken to be linear in the step. Of a path that comes to the value more
    than once, as of a policy that over-optimises and loses its gain again, the first time counts. Nothing is extrapolated.
    """
    path = [(p["step"], p[name], p[metric]) for p in points if name in p and metric in p]
    if not path:
        return None
    if path[0][1] == value:
        return Crossing(path[0][0], path[0][2])
    for (step, x, y), (next_step, next_x, next_y) in itertools.pairwise(path):
        if min(x, next_x) <= value <= max(x, next_x):
            part = (value - x) / (next_x - x)
            return Crossing(step + part * (next_step - step), y + part * (next_y - y))
    step, closest, y = min(path, key=lambda point: abs(point[1] - value))
    return Crossing(step, y, closest)
