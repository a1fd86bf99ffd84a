"""The closing table of a run: what was learned, where it lies, what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dpo_lab.reporting.formatting import strip_control
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.text import format_interval

COLUMNS = ("", "initial", "trained", "95 % interval", "n")
SHOWN = 600  # characters of a text of a sample
SAMPLE_COLUMNS = {"prompt": "prompt", "initial": "initial policy", "trained": "trained policy", "third": "third policy"}


def metric_rows(metrics: Mapping[str, Estimate], labels: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return a row with COLUMNS for every metric that was measured and has a label, in the order of the labels.

    The value of `initial/METRIC`, where there is one, is shown beside METRIC. labels: metric -> label, as recorded; if
    it is empty, as for runs recorded before labels were, every metric is shown by its name.
    """
    rows = []
    for name, label in (labels or {name: name for name in metrics if not name.startswith("initial/")}).items():
        if name in metrics:
            estimate, before = metrics[name], metrics.get(f"initial/{name}")
            rows.append(
                (
                    label,
                    _figure(before.value) if before else "",
                    _figure(estimate.value),
                    format_interval(estimate.interval, _figure),
                    str(estimate.n or ""),
                )
            )
    return rows


def cost_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of the kept policy and of the cost, from a run's record."""
    rows = []
    if kept := record.get("early_stopping"):
        rows.append((f"policy kept: the {kept['policy']} of {kept['last_step']} steps", f"step {kept['step']}"))
        if kept["best_value"] is not None:
            rows.append((f"best {kept['monitor']}, at step {kept['best_step']}", _figure(kept["best_value"])))
    if speed := record.get("throughput"):
        rows.append(("training tokens per second", f"{speed['tokens_per_second']:,.0f}"))
        trained = "prompts" if "rollouts" in record else "pairs"
        rows.append((f"training {trained} per second", f"{speed['pairs_per_second']:,.1f}"))
    if rollouts := record.get("rollouts"):
        rows.append(("samples drawn", f"{rollouts['samples']:,}"))
        rows.append(("reward queries", f"{rollouts['reward_queries']:,}"))
        if passes := rollouts.get("forward_passes"):
            rows.append(("responses through models", f"{sum(passes.values()):,}"))
    if memory := record.get("memory") if rollouts else None:
        rows.append(("models held (policies)", f"{memory['weights']:.2f}"))
    if peak := record.get("peak_memory_bytes"):
        rows.append(("peak memory (GiB)", f"{peak / 2**30:.2f}"))
    return rows


def print_summary(
    console: Console,
    metrics: Mapping[str, Estimate],
    labels: Mapping[str, str],
    samples: Sequence[Mapping[str, str]],
    folder: Path,
    next_commands: Sequence[str],
    cost: Sequence[tuple[str, str]] = (),
) -> None:
    """Print the summary of a run; it fits 80 columns. console: a plain_console; labels: see metric_rows;
    cost: see cost_rows."""
    table = Table(title="What it learned", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for row in metric_rows(metrics, labels):
        table.add_row(*map(strip_control, row))
    table.add_section()
    for label, value in cost:
        table.add_row(label, "", value)
    if table.row_count:
        console.print(table)
    if samples:
        _print_samples(console, samples)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    for command in next_commands:
        console.print(f"Next: {command}", soft_wrap=True)


def _print_samples(console: Console, samples: Sequence[Mapping[str, str]]) -> None:
    head, rows = sample_table(samples[:3])
    which = "both" if len(head) == 3 else "three"
    side_by_side = Table(title=f"Samples of {which} policies", title_justify="left", show_lines=True)
    for column in head:
        side_by_side.add_column(column, ratio=1 if column == "prompt" else 2, overflow="fold")
    for row in rows:
        side_by_side.add_row(*(strip_control(t if len(t) <= SHOWN else f"{t[:SHOWN]} ...") for t in row))
    console.print(side_by_side)


def sample_table(samples: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of samples, side by side: prompt, and the responses of the policies that there are."""
    keys = [key for key in SAMPLE_COLUMNS if key in samples[0]]
    return [SAMPLE_COLUMNS[key] for key in keys], [[sample[key] for key in keys] for sample in samples]


def _figure(value: float) -> str:
    """Return a value with three decimals, or one if it is large, so that a row fits 80 columns."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
