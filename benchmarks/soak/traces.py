"""What a run, a sweep and a report left behind, and where it differs from what an undisturbed twin left, bit by bit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.soak.processes import start
from dpo_lab.runs.run_record import CHECKPOINTS, RECORD
from dpo_lab.training.checkpoint_io import newest
from tests.support.small_fit import difference, left

# All of a record that may differ: when and by which processes the run was made, how fast, in how many starts.
OF_THE_CLOCK = (
    "started",
    "finished",
    "attempts",
    "seconds",
    "throughput",
    "memory",
    "peak_memory_bytes",
    "ranks",
    "git",
)
LOGS = re.compile(r"(run|output|rank-\d+)\.log|\.lock|events\.out\.tfevents.*")  # say when, or are as many as starts
CARD, COMMIT = "policy/README.md", re.compile(rb"\b[0-9a-f]{40}\b")  # which may have changed since the twin's start
LEFTOVER = re.compile(r"\..+\.\d+(\.tmp)?|\.rank-\d+\.error")


def differences(folder: Path, twin: Path, tensorboard: bool = True) -> Iterator[str]:
    """Where a run's folder differs from its twin's: files, record, newest checkpoint, scalars told to TensorBoard."""
    names, expected = _files(folder), _files(twin)
    yield from (f"{folder / name}: left over" for name in sorted(names - expected))
    yield from (f"{folder / name}: missing" for name in sorted(expected - names))
    for name in sorted(names & expected):
        if name != RECORD and _content(folder, name) != _content(twin, name):
            yield f"{folder / name}: other bytes"
    if (twin / RECORD).exists():
        one, other = (_record(path) for path in (folder, twin))
        for key in sorted(one.keys() | other.keys()):
            if found := difference(one.get(key), other.get(key), key):
                yield f"{folder / RECORD}: {found}"
    try:
        found = difference(*(_in_bits(left(path)) for path in (folder, twin)))
    except Exception as error:  # whatever it is, the newest checkpoint is not as it should be
        found = f"{type(error).__name__}: {error}"
    if found:
        yield f"{newest(folder / CHECKPOINTS)}: {found[:300]}"
    if tensorboard and _told(folder) != _told(twin):
        yield f"{folder}: TensorBoard was told other figures"


def _files(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {n for n in names if not (LOGS.fullmatch(Path(n).name) or re.fullmatch(rf"{CHECKPOINTS}/step=\d+\.ckpt", n))}


def _content(folder: Path, name: str) -> bytes:
    content = (folder / name).read_bytes()
    return COMMIT.sub(b"", content) if name == CARD else content


def _record(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / RECORD).read_text())
    return {key: value for key, value in record.items() if key not in OF_THE_CLOCK}


def _in_bits(value: Any) -> Any:
    """Tensors as their bytes, so that -0 is not 0, and NaN is itself."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), list(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: _in_bits(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_bits(inner) for inner in value]
    return repr(value) if isinstance(value, float) else value


def _told(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows of a run."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a start was cut short is what we are here for
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def report_differences(cwd: Path, twin: Path, runs: str) -> Iterator[str]:
    """Where the report of the runs in `runs`, a path in both, differs from the twin's once the clocks of both agree."""
    with FileLock(f"{twin}.report.lock"):
        kept = twin / "reported"
        expected = (kept / "said.txt", kept / "report.html")
        if not expected[1].exists() and (failed := _report(kept, twin, runs, twin)):
            yield failed
            return
    if failed := _report(cwd / "reported", cwd, runs, twin):
        yield failed
        return
    for path in expected:
        if path.read_bytes() != (cwd / "reported" / path.name).read_bytes():
            yield f"{cwd / 'reported' / path.name}: the report differs from the twin's"


def _report(folder: Path, place: Path, runs: str, clocks: Path) -> str | None:
    """Make the report of copies, whose records take what is of the clock from another place; why there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted((place / runs).rglob("*.json*")):
        copy = folder / path.relative_to(place)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if path.name == RECORD:
            other = json.loads((clocks / path.relative_to(place)).read_text())
            known = {key: value for key, value in json.loads(path.read_text()).items() if key not in OF_THE_CLOCK}
            known |= {key: other[key] for key in OF_THE_CLOCK if key in other}
            copy.write_text(json.dumps(dict(sorted(known.items()))))
    ended = start(["dpo_lab.report", runs, "--csv", "--page", "report.html"], folder)
    return None if ended.code == 0 else f"{folder}: no report was made: {ended.errors[-300:]}"
