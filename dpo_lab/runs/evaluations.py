"""Results of later evaluations: `evaluations/NAME.json` and `NAME.examples.jsonl` beside a run's record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.examples import Examples
from dpo_lab.runs.run_record import RunRefused, slug


def check(folder: Path, name: str) -> None:
    """Raise RunRefused if a result can't have this name. An empty name is valid: it becomes the next number."""
    if name and slug(name) != name:
        raise RunRefused(f"name={name}: not a valid file name; type name={slug(name)}")
    if name and (folder / f"{name}.json").exists():
        raise RunRefused(f"{folder / name}.json exists already; type name=another")


def commit(folder: Path, name: str, record: Mapping[str, Any], examples: Examples) -> Path:
    """Write a result atomically and return its path. Raise RunRefused if the name has been taken meanwhile."""
    with FileLock(folder / ".lock"):
        check(folder, name)
        taken = {path.stem for path in folder.glob("*.json")}
        name = name or next(str(number) for number in range(1, len(taken) + 2) if str(number) not in taken)
        path = folder / f"{name}.json"
        examples.write(folder / f"{name}.examples.jsonl")
        write_atomic(path, json.dumps(record, indent=1, allow_nan=False))
    return path
