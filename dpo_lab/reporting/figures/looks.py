"""The looks of a study that adds seeds until it is decided: each claim's effect and interval after every seed."""

from __future__ import annotations

import math

from dpo_lab.reporting.comparison import effect_text
from dpo_lab.reporting.figures.charts import Chart, Panel, Point, Series, chart
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import Scale, as_told

MOST = 9  # panels


def looks_figure(collection: RunSet) -> Chart | None:
    """Return the chart of the first primary predictions over the number of seeds; None for a study of a fixed number."""
    study, looks = collection.study, collection.record.get("looks") or ()
    panels = []
    for number, prediction in enumerate(study.predictions if study else ()):
        points = []
        for look in looks if prediction.primary else ():
            entry = look["predictions"][number]
            low, high = entry["interval"] or (None, None)
            if entry["effect"] is None:
                continue
            ends = (low, high) if low is not None and high is not None else None
            estimate = Estimate(entry["effect"], None, entry["n"], ends)
            told = as_told(prediction.scale, estimate)
            tip = f"{look['seeds']} seeds: {effect_text(estimate, prediction.scale)}, {entry['verdict']}"
            points.append(Point(look["seeds"], told.value, tip, y_interval=told.interval))
        if len(points) > 1 and all(math.isfinite(point.y) for point in points if not isinstance(point.y, str)):
            scale = "linear" if prediction.scale is Scale.plain else "log"
            panels.append(Panel(prediction.description, "seeds", [Series("effect", points)], y=scale))
    caption = (
        "Effects with their anytime-valid 95 % intervals after each look; there is none for fewer than five seeds."
    )
    return chart("Looks", panels[:MOST], caption)
