"""What it costs that nothing is lost: seconds spent in fsync and in checksums while `trainer.fit` trains, validates and saves.

    python -m benchmarks.saving                                  the embedded task under its defaults (a minute)
    python -m benchmarks.saving --shape 135M                     one save of 135 million weights and their Adam state
    python -m benchmarks.saving trainer.max_steps=320 ...        with settings of dpo_lab.train

Every repeat is the real command `dpo_lab.train` in a fresh process whose os.fsync, BLAKE2 and CRC-32 are timed, by the wall;
the rest of the fit is what they are held against. Of the large one saves alone are timed, and the length of a step above
which they cost less than 5 % is told. Writes outputs/benchmarks/ and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from lightning.pytorch import Trainer

from benchmarks.results import save, write_results
from benchmarks.workload import make_models
from dpo_lab import train
from dpo_lab.runs import metrics_log
from dpo_lab.training import checkpoint_io

CADENCE = 80  # steps between saves: callbacks.checkpoint.every_n_steps
P, T = ParamSpec("P"), TypeVar("T")
seconds: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)


def timed(name: str, function: Callable[P, T]) -> Callable[P, T]:
    """The function, its seconds and calls counted under `name`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - began
            calls[name] += 1

    return call


class TimedDigest:
    """As hashlib.blake2b, timed."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._digest = hashlib.blake2b(*args, **settings)
        self.update, self.hexdigest = timed("checksum", self._digest.update), self._digest.hexdigest


class _Hashlib:
    blake2b = TimedDigest


class _Zlib:
    crc32 = staticmethod(timed("checksum", zlib.crc32))


def watch() -> None:
    """From now on in this process what durability costs is timed."""
    os.fsync = timed("fsync", os.fsync)
    checkpoint_io.hashlib = _Hashlib  # type: ignore[assignment, misc]
    metrics_log.zlib = _Zlib  # type: ignore[assignment, misc]
    io = checkpoint_io.VerifiedCheckpointIO
    io.save_checkpoint = timed("save", io.save_checkpoint)  # type: ignore[method-assign]


def one_run(settings: Sequence[str], found: Path) -> None:
    """Train through the command; what its fit took goes to `found`."""
    watch()
    fit = Trainer.fit

    def timed_fit(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        seconds.clear()
        calls.clear()
        timed("fit", fit)(trainer, *args, **kwargs)
        told = {"steps": trainer.global_step, "seconds": dict(seconds), "calls": dict(calls)}
        found.write_text(json.dumps(told))

    Trainer.fit = timed_fit  # type: ignore[method-assign, assignment]
    sys.argv = ["dpo_lab.train", *settings]
    train.main()


def of_runs(settings: Sequence[str], repeats: int) -> dict[str, Any]:
    """One row: medians of the repeats, each a fresh process in a folder that a first one has warmed."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dpo-lab-saving-") as folder:
        (Path(folder) / "outputs").mkdir()
        for repeat in range(repeats + 1):
            found = Path(folder, f"found-{repeat}.json")
            command = [
                sys.executable,
                "-m",
                "benchmarks.saving",
                "--into",
                str(found),
                f"name=saving_{repeat}",
                *settings,
            ]
            environment = os.environ | {"PYTHONPATH": os.getcwd()}
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            rows.append(json.loads(found.read_text()))
            print(f"{repeat}: {rows[-1]}", flush=True)
    names = ("fit", "save", "fsync", "checksum")
    middle = {name: statistics.median(row["seconds"][name] for row in rows[1:]) for name in names}
    shares = [_share(row["seconds"]) for row in rows[1:]]
    return {
        "what": " ".join(("the embedded task", *settings)),
        "cost": statistics.median(shares),
        "steps": rows[0]["steps"],
        "saves": rows[0]["calls"]["save"],
        "seconds": middle,
        "spread": [min(shares), max(shares)],
        "repeats": repeats,
    }


def _share(found: dict[str, float]) -> float:
    """What fsync and checksums add to the rest."""
    cost = found["fsync"] + found["checksum"]
    return cost / (found["fit"] - cost)


def of_a_large_one(repeats: int) -> dict[str, Any]:
    """One row: saves of 135M in fp32 with Adam's two moments."""
    model, _ = make_models("135M")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    moments = {number: {"exp_avg": w * 0.1, "exp_avg_sq": w * w} for number, w in enumerate(weights.values())}
    state = {"state_dict": weights, "optimizer_states": [{"state": moments}]}
    watch()
    rows: list[dict[str, float]] = []
    size = 0
    with tempfile.TemporaryDirectory(prefix="dpo-lab-saving-", dir=".") as folder:
        for repeat in range(repeats + 1):
            seconds.clear()
            path = Path(folder, f"step={repeat}.ckpt")
            checkpoint_io.VerifiedCheckpointIO().save_checkpoint(state, path)
            size = path.stat().st_size
            path.unlink()
            rows.append(dict(seconds))
            print(f"{repeat}: {rows[-1]}, {size / 1e9:.2f} GB", flush=True)
    return {
        "what": f"135M, AdamW in fp32: {size / 1e9:.2f} GB",
        "steps": CADENCE,
        "saves": 1,
        "seconds": {name: statistics.median(row[name] for row in rows[1:]) for name in ("save", "fsync", "checksum")},
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of dpo_lab.train, for the embedded task")
    parser.add_argument("--shape", choices=["small", "135M"], default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.into:
        one_run(chosen.settings, chosen.into)
        return
    torch.set_num_threads(1)
    found = of_a_large_one(chosen.repeats) if chosen.shape == "135M" else of_runs(chosen.settings, chosen.repeats)
    save(f"saving-{chosen.shape}", found)
    write_results()


if __name__ == "__main__":
    main()
