"""The figures of a run, from its folder alone: learning curves and what its pairs came to, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lab.runs import metrics_log
from dpo_lab.runs.examples import EXAMPLES, PairExample, pair_examples, read
from dpo_lab.runs.run_record import read_record
from dpo_lab.runs.trajectory import points_of
from dpo_lab.stats.calibration import BINS

FOLDER = "figures"
NAMES = ("curves", "trajectory", "margins", "gold", "calibration", "length")


def remove_figures(folder: Path) -> None:
    """Remove the figures drawn for the run in `folder`, and no other file."""
    for path in (folder / FOLDER).glob("*.*"):
        if path.stem in NAMES and path.suffix in (".png", ".svg"):
            path.unlink()


def draw_run(folder: Path) -> list[Path]:
    """Draw the figures that the run folder has data for into its `figures`; return their paths. Older figures are
    removed.

    The same data give the same bytes. Raises FileNotFoundError if the folder holds no run.
    """
    from dpo_lab.reporting.figures.style import draw

    record = read_record(folder)
    if record is None:
        raise FileNotFoundError(
            f"{folder}: holds no run.json; type the folder of a run, e.g. outputs/dpo/default/seed=0"
        )
    log, examples = folder / metrics_log.METRICS_LOG, folder / EXAMPLES
    rows = list(metrics_log.rows(log)) if log.exists() else []
    pairs = pair_examples(read(examples)) if examples.exists() else []
    remove_figures(folder)
    (folder / FOLDER).mkdir(exist_ok=True)
    files = []
    for name, spec in _specs(rows, pairs, record).items():
        for kind, content in draw(spec).items() if spec is not None else ():
            files.append(folder / FOLDER / f"{name}.{kind}")
            files[-1].write_bytes(content)
    return files


def _specs(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[PairExample], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figure to draw for each name, None if there is no data for it."""
    from dpo_lab.reporting.figures import learning_curves, pair_plots, trajectory

    beta = float(record["config"].get("beta", 1.0))
    bins = record["config"].get("evals", {}).get("calibration", {}).get("bins", BINS)
    is_reward = "reward_model" in record["config"]
    held_out = [pair for pair in pairs if pair.split == "held-out"]
    return {
        "curves": learning_curves.curves(rows, is_reward),
        "trajectory": trajectory.trajectory(points_of(rows)),
        "margins": pair_plots.margins(pairs, is_reward),
        "gold": pair_plots.gold(held_out, beta, is_reward),
        "calibration": pair_plots.calibration(held_out, bins),
        "length": pair_plots.length(held_out, beta, is_reward),
    }
