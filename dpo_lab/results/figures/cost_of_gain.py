"""The figure of a sweep of beta, from run records: what a policy gained, and what that cost its language."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lab.results.identity import difference

COLOURS = {"cached": "#0072B2", "uniform": "#D55E00"}  # Okabe and Ito's, told apart by the colour-blind
LABELS = {"cached": "frozen reference", "uniform": "uniform reference"}
VARYING = ("beta", "loss.beta", "seed", "noise.seed")
PANELS = {
    "well_formed": "well-formed samples, share of the initial policy's",
    "perplexity": "held-out perplexity, times the initial policy's",
    "kl": "KL to the initial policy, nats",
}


def done_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all finished runs under a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("run.json"))]
    return [r for r in records if r["status"] == "done"]


def measured(record: Mapping[str, Any], name: str) -> float:
    """A final metric; those with an `initial/` twin relative to it, but gains as they are."""
    value, twin = record["metrics"][name]["value"], record["metrics"].get(f"initial/{name}")
    if twin is None:
        return value
    return value / twin["value"] if twin["value"] else math.nan


def by_arm(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[Mapping[str, Any]]]]:
    """Records by reference and beta. Raises ValueError where they differ in anything else but the seed."""
    arms: dict[str, dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        changed = difference(records[0]["config"], record["config"])
        if others := [key for key in changed if key.split(".")[0] != "reference" and key not in VARYING]:
            raise ValueError(f"these runs differ in {', '.join(others)} too; type the folder of one sweep of beta")
        arms[record["config"]["reference"]["kind"]][record["config"]["beta"]].append(record)
    return arms


def cost_of_gain(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Language against gain in gold reward: a line per reference through its betas, means with the seeds' range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for reference, betas in by_arm(records).items():
            points = []
            for beta, runs in sorted(betas.items()):
                gains, costs = ([measured(r, m) for r in runs] for m in ("gold_gain", name))
                x, y = statistics.mean(gains), statistics.mean(costs)
                points.append((x, y))
                colour = COLOURS[reference]
                axis.plot([x, x], [min(costs), max(costs)], color=colour, lw=1)
                axis.plot([min(gains), max(gains)], [y, y], color=colour, lw=1)
                axis.annotate(f"{beta:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour)
            marker = "o-" if reference == "cached" else "s--"
            axis.plot(*zip(*points, strict=True), marker, color=COLOURS[reference], ms=5, label=LABELS[reference])
        axis.set_xlabel("gain in gold reward (initial sd)", fontsize=9)
        axis.set_title(label, fontsize=9)
        axis.margins(0.1)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, ncols=2, loc="outside upper center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The same as Markdown: means over seeds."""
    lines = [
        "| reference | beta | seeds | accuracy (truth) | gain | KL | well-formed | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for reference, betas in by_arm(records).items():
        for beta, runs in sorted(betas.items()):
            mean = {m: statistics.mean(measured(r, m) for r in runs) for m in ("true_accuracy", "gold_gain", *PANELS)}
            lines.append(
                f"| {LABELS[reference]} | {beta:g} | {len(runs)} | {mean['true_accuracy']:.3f} | {mean['gold_gain']:.2f}"
                f" | {mean['kl']:.2f} | {mean['well_formed']:.2f} | {mean['perplexity']:.2f} |"
            )
    return "\n".join(lines)
