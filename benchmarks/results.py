"""Measurements on disk, and the page made of them: benchmarks/RESULTS.md."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEASURED = Path("outputs/benchmarks")
PAGE = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "lightning")


def context() -> dict[str, Any]:
    """Date, versions and machine: what a measurement made now is true of."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in PACKAGES if find_spec(package)},
        "machine": f"{processor()}, {torch.get_num_threads()} thread, Python {platform.python_version()}",
    }


def save(name: str, measured: dict[str, Any]) -> None:
    """Keep one table's figures with their context."""
    MEASURED.mkdir(parents=True, exist_ok=True)
    (MEASURED / f"{name}.json").write_text(json.dumps(context() | measured, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_results() -> None:
    """RESULTS.md with everything that was measured here in its place; printed as well. What was not stays as it stands."""
    found: dict[str, list[str]] = {}
    sweep = MEASURED / "end-to-end.json"
    if sweep.exists() and "ours" in (measured := json.loads(sweep.read_text()))["rows"]:
        found |= _section(_end_to_end(measured))
    default = MEASURED / "default-run.json"
    if default.exists() and "ours" in (measured := json.loads(default.read_text()))["rows"]:
        found |= _section(_default_run(measured))
    if ranks := _measured("ranks"):
        found |= _section(_ranks(ranks))
    if saving := _measured("saving"):
        found |= _section(_saving(saving))
    if (online := MEASURED / "online.json").exists():
        from benchmarks.online import table as online_table

        found |= _section(online_table(json.loads(online.read_text())))
    for table in _measured("step"):
        found |= _section(_step(table))
    print("\n".join(line for lines in found.values() for line in lines))
    head, *sections = PAGE.read_text().split("\n## ")
    kept = dict(_section([*f"## {section}".rstrip("\n").split("\n"), ""]).popitem() for section in sections)
    lines = [line for section in (kept | found).values() for line in section]
    PAGE.write_text("\n".join([head.rstrip("\n"), "", *lines]))


def _section(lines: list[str]) -> dict[str, list[str]]:
    return {lines[0]: lines}


def _measured(name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(MEASURED.glob(f"{name}-*.json"), key=_order)]


def _end_to_end(sweep: dict[str, Any]) -> list[str]:
    rows = [sweep["rows"][part] for part in ("ours", "defaults", "tuned") if part in sweep["rows"]]
    mine = rows[0]
    lines = [f"| {r['what']} | {r['seconds']:.0f} | {r['seconds'] / mine['seconds']:.1f} |" for r in rows]
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in mine["stages"].items())
    started = mine["seconds"] - sum(mine["stages"].values())
    notes = (
        f"{sweep['date']}, `python -m benchmarks.end_to_end`: {len(sweep['betas'])} betas, {sweep['epochs']} epochs of"
        f" {sweep['pairs']} pairs, {sweep['batch']} a step, {sweep['held_out']} held out; {sweep['dtype']}. CPU seconds of"
        f" all processes. Ours by stage: start-up {started:.0f}, {stages}. {sweep['machine']}; {_versions(sweep)}."
    )
    heading = f"## A whole sweep: {sweep['shape']}, {sweep['mix']}"
    return [heading, "", "| what | CPU s | times ours |", "|---|---|---|", *lines, "", notes, ""]


def _default_run(measured: dict[str, Any]) -> list[str]:
    parts = ("stage", "reference", "training", "validation", "whole")
    spent = {
        variant: {part: [turn[part] for turn in turns] for part in parts if part in turns[0]}
        for variant, turns in measured["rows"].items()
    }
    middle = {variant: {part: median(of) for part, of in times.items()} for variant, times in spent.items()}
    mine = middle["ours"]["stage"]
    rows = [
        "| what | DPO stage, CPU s | min .. max | times ours | reference | training | of it validation | whole command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, times in middle.items():
        stage = spent[variant]["stage"]
        inside = f"{times['validation']:.1f}" if "validation" in times else ""
        rows.append(
            f"| {variant} | {times['stage']:.1f} | {min(stage):.1f} .. {max(stage):.1f} | {times['stage'] / mine:.2f}"
            f" | {times['reference']:.1f} | {times['training']:.1f} | {inside} | {times['whole']:.1f} |"
        )
    theirs = {name: times["stage"] / mine for name, times in middle.items() if not name.startswith("ours")}
    summary = "Ours, its reference included, against " + "; ".join(f"{name}: {of:.2f} x" for name, of in theirs.items())
    notes = (
        f"{measured['date']}, `python -m benchmarks.default_run`: 160 steps of 32 pairs in float32, validated and saved"
        " twice; the initial policy lies there already. CPU seconds of all processes, medians of"
        f" {measured['repeats']}; ours evaluates by sampling in its whole command. {measured['machine']};"
        f" {_versions(measured)}."
    )
    return ["## The default run", "", *rows, "", f"{summary}.", "", notes, ""]


def _ranks(measured: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| what | 1 x 1, s a step | 2 x 1, s a step | throughput | CPU s a step | tokens of the fuller rank | gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        one, two = found["rows"]
        (low, high), (low_of_two, high_of_two) = one["spread"], two["spread"]
        rows.append(
            f"| {found['shape']}, {found['mix']} | {one['seconds']:.2f} ({low:.2f} .. {high:.2f})"
            f" | {two['seconds']:.2f} ({low_of_two:.2f} .. {high_of_two:.2f}) | {one['seconds'] / two['seconds']:.2f} x"
            f" | {one['cpu']:.2f} and {two['cpu']:.2f} | {found['imbalance'] - 1:+.1%} | {found['gradient_megabytes']:.0f} MB |"
        )
    last = measured[-1]
    notes = (
        f"{last['date']}, `python -m benchmarks.ranks`: optimizer steps of `trainer.fit` under `trainer=cpu` and under"
        f" `trainer=ddp_cpu`, a process and a thread a rank, gradients added up over gloo; fp32, medians of"
        f" {last['repeats']} times {last['steps']} steps. Tokens of the fuller rank: more than its even share."
        f" {last['machine']}; {_versions(last)}."
    )
    return ["## Two ranks against one process", "", *rows, "", notes, ""]


def _saving(measured: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| what | steps | saves | in saves, s | fsync, s | checksums, s | of the rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        seconds = found["seconds"]
        if "cost" in found:
            (low, high), share = found["spread"], f"{found['cost']:.2%}"
            share += f" ({low:.2%} .. {high:.2%}) of {seconds['fit']:.1f} s"
        else:
            share = f"5 % of steps of {(seconds['fsync'] + seconds['checksum']) / found['steps'] / 0.05:.2f} s"
        rows.append(
            f"| {found['what']} | {found['steps']} | {found['saves']} | {seconds['save']:.2f} | {seconds['fsync']:.2f}"
            f" | {seconds['checksum']:.2f} | {share} |"
        )
    last = measured[-1]
    notes = (
        f"{last['date']}, `python -m benchmarks.saving`: a save every 80 steps, the default; wall seconds of `trainer.fit`,"
        f" medians of {last['repeats']}; fsync and checksums of checkpoints and journal. {last['machine']}; {_versions(last)}."
    )
    return ["## What it costs that nothing is lost", "", *rows, "", notes, ""]


def _versions(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in measured["versions"].items())


def _order(path: Path) -> tuple[int, int]:
    _, shape, *mix = path.stem.split("-")
    return ["small", "135M"].index(shape), ["", "chat", "long", "short"].index("".join(mix))


def _row(table: dict[str, Any], variant: str, dtype: str) -> dict[str, Any]:
    return next(r for r in table["rows"] if r["variant"] == variant and r["dtype"] == dtype)


def _best_tuned(table: dict[str, Any]) -> dict[str, Any]:
    tuned = [r for r in table["rows"] if r["variant"] == "TRL tuned"]
    return max(tuned, key=_speed)


def _step(table: dict[str, Any]) -> list[str]:
    rows = [
        "| variant | dtype | tokens/s | CPU s | min .. max | memory, MB | of the fp32 GEMM limit | gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table["rows"]:
        error = "twin" if r["gradient_error"] is None else f"{r['gradient_error']:.1e}"
        low, high = r["spread"]
        limit = f"{r['limit_share']:.0%}" if r["dtype"] == "fp32" else ""
        rows.append(
            f"| {r['variant']} | {r['dtype']} | {r['tokens_per_second']:.0f} | {r['seconds']:.2f} | {low:.2f} .. {high:.2f}"
            f" | {r['memory']:.0f} | {limit} | {error} |"
        )
    mine, tuned = _row(table, "ours", "fp32"), _best_tuned(table)

    def times(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
        return f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.1f} x"

    def share(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
        return f"1/{theirs['memory'] / ours['memory']:.1f}"

    defaults = {dtype: _row(table, "TRL, its defaults", dtype) for dtype in ("fp32", "bf16")}
    checkpointed = _row(table, "ours, checkpointing", "fp32")
    summary = (
        f"Ours against TRL's defaults: {times(mine, defaults['fp32'])} in fp32,"
        f" {times(_row(table, 'ours', 'bf16'), defaults['bf16'])} in bf16;"
        f" against TRL tuned ({tuned['dtype']}): {times(max(mine, _row(table, 'ours', tuned['dtype']), key=_speed), tuned)};"
        f" against the original loop: {times(mine, table['rows'][0])}."
        f" Step memory of TRL's at the same batch: {share(mine, _row(table, 'TRL, without checkpointing', 'fp32'))} both"
        f" without checkpointing, {share(checkpointed, defaults['fp32'])} both with it."
    )
    return [f"## {table['shape']}, {table['mix']}", "", *rows, "", summary, "", _context(table), ""]


def _speed(row: dict[str, Any]) -> float:
    return row["tokens_per_second"]


def _context(table: dict[str, Any]) -> str:
    return (
        f"{table['date']}, `python -m benchmarks.step`: {table['pairs']} pairs a step, {table['tokens']} tokens (prompts"
        f" twice), ours in micro-batches of {table['tokens_per_microbatch']} tokens; medians of {table['repeats']}. The GEMM"
        f" limit is the rate of the step's own fp32 matrix products alone, {table['gemm'] / 1e9:.0f} GFLOP/s (a product of"
        f" 1536 x 1536 matrices: {table['square_gemm'] / 1e9:.0f}). {table['machine']}; {_versions(table)}."
    )
