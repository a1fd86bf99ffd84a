"""The points of a run's trajectory, as they lie in its metrics log and its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

GROUP = "trajectory/"  # of its metrics in the metrics log and in TensorBoard
REWARDS = ("reward", "gold", "judge")  # that a point may have; REWARD_gain: over the initial policy, in its sd


def points_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points among the rows of a metrics log, in the order of steps: `step` and the metrics without GROUP,
    those that are finite.
    """
    points = [
        {"step": row["step"]}
        | {name.removeprefix(GROUP): row[name] for name in row if name.startswith(GROUP) and math.isfinite(row[name])}
        for row in rows
    ]
    return sorted((point for point in points if len(point) > 1), key=lambda point: point["step"])


def text_of(point: Mapping[str, float]) -> str:
    """Return the main metrics of a point in one line.

    >>> text_of({"gold": 1.5, "gold_gain": 0.9, "kl": 2.25, "length": 20.5})
    'gold 1.5 (+0.90 sd), kl 2.25, length 20.5'
    """
    parts = []
    for name in (*REWARDS, "kl", "length"):
        if name in point:
            gain = f" ({point[f'{name}_gain']:+.2f} sd)" if f"{name}_gain" in point else ""
            parts.append(f"{name} {point[name]:.3g}{gain}")
    return ", ".join(parts)
