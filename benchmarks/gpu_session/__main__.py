"""Check and measure on a real GPU, in one script of at most 15 minutes.

    python -m benchmarks.gpu_session                             on the GPU that torch sees
    python -m benchmarks.gpu_session --device cpu --scale tiny   a rehearsal that needs none; its figures mean nothing

Each phase is a process under a time limit. What it finds is appended to a JSON lines file as it is found, so a phase that
crashes or runs out of time keeps its earlier rows and stops no other. Prints the rows as Markdown tables at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_session import model_phases, run_phases
from benchmarks.gpu_session.scale import SCALES, Scale
from benchmarks.results import MEASURED, context

Row = dict[str, Any]
PHASES: dict[str, tuple[Callable[[Scale, torch.device], Iterator[Row]], int]] = {  # with the limit in seconds
    "versions": (run_phases.versions, 30),
    "tests": (run_phases.tests, 180),
    "runs": (run_phases.runs, 180),
    "exactness": (model_phases.exactness, 60),
    "rounding": (model_phases.rounding, 30),
    "steps": (model_phases.steps, 240),
    "head": (model_phases.head, 30),
    "sampler": (model_phases.sampler, 30),
    "memory": (run_phases.out_of_memory, 40),
}


def run_phase(name: str, scale: Scale, device: torch.device, output: Path) -> None:
    """Run one phase in this process; append its rows to `output`."""
    work, _ = PHASES[name]
    for row in work(scale, device):
        append(output, {"phase": name, **row})


def append(output: Path, row: Row) -> None:
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def run_session(device: str, scale: str, output: Path, phases: list[str], seconds: float) -> list[Row]:
    """Run phases one after another, each in a process, until the time is over; return all rows."""
    start = time.monotonic()
    for name in phases:
        left = seconds - (time.monotonic() - start)
        limit = min(PHASES[name][1], left)
        if limit < 10:
            append(output, {"phase": name, "status": "not run, the session's time was over"})
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_session", "--device", device, "--scale", scale]
        began = time.monotonic()
        try:
            done = subprocess.run(
                [*command, "--output", str(output), "--phase", name], timeout=limit, capture_output=True, text=True
            )
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            status = "done" if done.returncode == 0 else f"failed: {last[0]}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its limit of {limit:.0f} s"
        append(output, {"phase": name, "status": status, "seconds": round(time.monotonic() - began, 1)})
        print(f"{name}: {status}", flush=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def tables(rows: list[Row]) -> str:
    """Markdown: a table of the phases, then one for each kind of row that a phase found."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["phase"] if "status" not in row else "phases", *row), []).append(row)
    lines = []
    for (name, *keys), found in kinds.items():
        lines += [f"## {name}", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_cell(row[key]) for key in keys) + " |" for row in found] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--output", type=Path, default=MEASURED / "gpu-session.jsonl")
    parser.add_argument("--minutes", type=float, default=13.0)
    parser.add_argument("--only", choices=PHASES, action="append", help="these phases alone")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; for a rehearsal type --device cpu --scale tiny")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    if chosen.phase:
        run_phase(chosen.phase, SCALES[chosen.scale], torch.device(chosen.device), chosen.output)
        return
    chosen.output.write_text(
        json.dumps({"phase": "session", "device": chosen.device, "scale": chosen.scale} | context())
    )
    with chosen.output.open("a") as file:
        file.write("\n")
    rows = run_session(chosen.device, chosen.scale, chosen.output, chosen.only or list(PHASES), 60 * chosen.minutes)
    print(tables(rows))
    if any(row.get("status", "done") != "done" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
