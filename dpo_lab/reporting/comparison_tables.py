"""The tables of a comparison: sortable cells of text, shared by page and terminal."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_lab.reporting.comparison import Measured, count_text, difference_text, interval_text
from dpo_lab.reporting.formatting import format_value
from dpo_lab.runs.commands import command_of
from dpo_lab.stats.text import format_p
from dpo_lab.studies.load import recorded_jobs
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.scales import prefix
from dpo_lab.studies.seed_effects import is_anytime

NOISE = "flipped by label noise"  # among a record's counts
LEVELS = {"warning": 0, "info": 1}


@dataclass(frozen=True)
class Cell:
    """A table cell. sort: sort key, if not the text; below: smaller lines under it; is_text: left-aligned."""

    text: str
    sort: float | None = None
    below: Sequence[str] = ()
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table. rows: of cells, the first names its row; says: how to read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    says: str = ""
    titles: Mapping[str, str] = field(default_factory=dict)  # head -> its meaning


def words(*texts: str) -> list[Cell]:
    """Return a text cell for each text."""
    return [Cell(text, is_text=True) for text in texts]


def number(value: float | None, text: str | None = None) -> Cell:
    """Return the cell of a number, empty for None."""
    return Cell("", None) if value is None else Cell(text or format_value(value), float(value))


def arms_table(collection: RunSet, measured: Mapping[str, Sequence[Measured]]) -> Table:
    """Return the table of arms: number of runs, each metric with its interval, and its difference to the baseline."""
    head = ["arm", "runs", *(h for metric in measured for h in _heads(metric, collection.baseline))]
    rows = []
    for place, arm in enumerate(collection.arms):
        runs = [run for run in collection.runs if run.arm == arm.name]
        done = sum(run.is_done for run in runs)
        count = f"{done}" if done == len(runs) else f"{done} of {len(runs)}"
        row = [
            Cell(arm.name, is_text=True, below=[arm.group] if arm.group not in arm.name else []),
            Cell(count, float(done)),
        ]
        for figures in measured.values():
            row += _measured(figures[place], collection.baseline)
        rows.append(row)
    says = (
        "Means over seeds with 95 % intervals (Student's t over seeds; exact binomial for yes/no metrics), of KL, perplexity"
        " and other ratio quantities geometric means."
    )
    if collection.baseline:
        says += (
            f" Differences and factors (x) are to {collection.baseline}, paired by seed; p Holm-corrected over arms."
        )
        says += " Of differences, intervals and p are anytime-valid." * is_anytime(collection.record)
    return Table("Arms", head, rows, says)


def _heads(metric: str, baseline: str | None) -> list[str]:
    return [metric, f"Δ {metric}"] if baseline else [metric]


def _measured(of: Measured, baseline: str | None) -> list[Cell]:
    if of.estimate is None:
        return [Cell("not measured")] + [Cell("")] * (baseline is not None)
    value, _, interval = interval_text(of.estimate).partition(" ")
    fewer = f"n = {count_text(of)}" if of.n != of.planned else ""
    cells = [Cell(value, of.estimate.value, [line for line in (interval.strip("()"), fewer) if line])]
    if baseline is None:
        return cells
    if of.arm == baseline:
        return [*cells, Cell("baseline", 0.0)]
    if of.difference is None:
        return [*cells, Cell("")]
    value, _, interval = difference_text(of).removeprefix(sign := prefix(of.scale)).partition(" ")
    value = sign + value
    p = f"p {format_p(of.p)}" if of.p is not None else ""
    return [*cells, Cell(value, of.difference.value, [line for line in (interval.strip("()"), p) if line])]


def counts_table(collection: RunSet) -> Table | None:
    """Return the table of each arm's data counts, with the range over seeds where they differ; None if no run has
    counts.
    """
    counts = {arm.name: _records(collection, arm.name, "data") for arm in collection.arms}
    names = list(dict.fromkeys(name for records in counts.values() for record in records for name in record))
    names = [n for n in names if any(record.get(n) for records in counts.values() for record in records)]
    if not names:
        return None
    rows = [
        [*words(arm), *(_range([record.get(name, 0) for record in records]) for name in names)]
        for arm, records in counts.items()
        if records
    ]
    return Table("Data", ["arm", *names], rows, "Rows and pairs of each run; minimum and maximum where seeds differ.")


def noise_table(collection: RunSet) -> Table | None:
    """Return the table of label noise, requested and applied; None if no run counted flipped labels."""
    rows = []
    for arm in collection.arms:
        runs = [run for run in _known(collection, arm.name) if NOISE in run.record.get("data", {})]
        if not runs:
            continue
        asked = sorted({_asked(run.record.get("config", {}).get("noise") or {}) for run in runs})
        pairs = sum(run.record["data"].get("train pairs", 0) for run in runs)
        flipped = sum(run.record["data"][NOISE] for run in runs)
        kinds: Counter[str] = Counter()
        for run in runs:
            for kind, (_, of_kind) in (
                run.record.get("data_quality", {}).get("noise", {}).get("flipped") or {}
            ).items():
                kinds[kind] += of_kind
        split = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items() if count)

        of_fit = ("clean", "flipped") if flipped else ("clean",)
        fits = {kind: _mean_of(runs, f"train/{kind}/accuracy") for kind in of_fit}
        rows.append(
            [
                *words(arm.name, "; ".join(asked)),
                number(flipped, f"{flipped:,} of {pairs:,}"),
                number(100 * flipped / pairs if pairs else None, f"{100 * flipped / pairs:.1f} %" if pairs else None),
                *words(split),
                *(number(fits.get(kind)) for kind in ("clean", "flipped")),
            ]
        )
    if not rows:
        return None
    head = [
        "arm",
        "requested",
        "flipped, all seeds",
        "share",
        "flipped, by kind of pair",
        "accuracy, clean",
        "accuracy, flipped",
    ]
    says = (
        "Label noise as requested and as applied to the training pairs; accuracy: share of training pairs that the trained"
        " policy ranks as labelled."
    )
    return Table("Label noise", head, rows, says)


def _asked(noise: Mapping[str, Any]) -> str:
    if not noise.get("rate", 1.0):
        return "none"
    return ", ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in noise.items() if k != "seed") or "unknown"


def health_table(collection: RunSet) -> Table:
    """Return the table of health findings by arm."""
    found: dict[tuple[str, str], list[tuple[RunData, Mapping[str, Any]]]] = {}
    for run in collection.runs:
        for finding in run.record.get("health") or ():
            found.setdefault((run.arm, finding["name"]), []).append((run, finding))
    rows = []
    for (arm, name), each in found.items():
        run, first = each[0]
        runs = len(_known(collection, arm))
        where = Cell(f"{len(each)} of {runs}", float(len(each)))
        says = f"{first['message']} ({first['threshold']}; seed {run.seed})"
        rows.append([*words(arm, name), Cell(first["severity"], float(LEVELS.get(first["severity"], 2)), is_text=True), where,
                     *words(says, first["suggestion"])])  # fmt: skip
    return Table("Health", ["arm", "finding", "severity", "runs", "message", "suggestion"], rows)


def absent_table(collection: RunSet, page_folder: Path) -> Table:
    """Return the table of runs that are not done, with error and log."""
    rows = [
        [
            *words(run.arm),
            Cell(str(run.seed), float(run.seed)),
            *words(run.status, run.error or "", _log(run, page_folder)),
        ]
        for run in collection.runs
        if not run.is_done
    ]
    return Table("Runs without a result", ["arm", "seed", "status", "error", "log"], rows)


def _log(run: RunData, page_folder: Path) -> str:
    logs = [run.folder / name for name in ("output.log", "run.log")]
    found = next((relative(log, page_folder) for log in logs if run.status != "missing" and log.is_file()), None)
    return found or run.log or ""


def commands_table(collection: RunSet) -> Table:
    """Return the table of commands, one per run."""
    jobs = recorded_jobs({"cells": (), **collection.record})
    overrides_of = {(job["arm"], job["seed"]): job.get("overrides", ()) for job in jobs}
    rows = []
    for run in collection.runs:
        overrides = run.record.get("overrides") or overrides_of.get((run.arm, run.seed), ())
        if overrides:
            # a run without a record is one of a study, which only trains policies
            command = command_of(run.record["config"]) if run.record.get("config") else "train"
            typed = f"python -m dpo_lab.{command} {shlex.join(overrides)}"
            rows.append([*words(run.arm), Cell(str(run.seed), float(run.seed)), *words(typed)])
    return Table("Commands of single runs", ["arm", "seed", "command"], rows)


def provenance_table(collection: RunSet) -> Table:
    """Return versions, commits, times and cost; where runs differ, each value with its number of runs."""
    known = [run for run in collection.runs if run.record]
    facts: list[tuple[str, list[str]]] = []
    for name in sorted({name for run in known for name in run.record.get("versions") or {}}):
        facts.append((name, [str((run.record.get("versions") or {}).get(name, "unknown")) for run in known]))
    if any("git" in run.record for run in known):
        facts.append(("commit", [_commit(run.record.get("git")) for run in known]))
    rows = [[*words(name, _distinct(values))] for name, values in facts]
    started = sorted(run.record["started"] for run in known if "started" in run.record)
    if started:
        rows.append(
            words("runs started", f"{started[0]} to {started[-1]}" if started[0] != started[-1] else started[0])
        )
    if seconds := collection.cpu_seconds():
        rows.append(words("cost of finished runs", f"{seconds / 3600:.2f} CPU hours"))
    return Table("Provenance", ["", "value"], rows)


def _commit(git: Mapping[str, Any] | None) -> str:
    if not git:
        return "unknown"
    return f"{git['commit']}{', with uncommitted changes' if git.get('dirty') else ''}"


def _distinct(values: Sequence[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return values[0]
    return "; ".join(
        f"{value} ({count} runs)" for value, count in sorted(counts.items(), key=lambda it: (-it[1], it[0]))
    )


def _known(collection: RunSet, arm: str) -> list[RunData]:
    return [run for run in collection.runs if run.arm == arm and run.record]


def _records(collection: RunSet, arm: str, key: str) -> list[Mapping[str, Any]]:
    return [run.record[key] for run in _known(collection, arm) if run.record.get(key)]


def _range(values: Sequence[float]) -> Cell:
    low, high = min(values), max(values)
    return Cell(f"{low:,}" if low == high else f"{low:,} .. {high:,}", float(low))


def _mean_of(runs: Iterable[RunData], metric: str) -> float | None:
    values = [run.metrics[metric].value for run in runs if metric in run.metrics]
    return sum(values) / len(values) if values else None


def relative(path: Path, to: Path) -> str:
    """Return a path relative to a folder, so that a page is the same wherever it was made."""
    return Path(os.path.relpath(path, to)).as_posix()
