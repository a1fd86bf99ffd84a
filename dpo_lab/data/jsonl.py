"""Preference pairs from a JSONL file: one object a line with `prompt`, `chosen` and `rejected`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from dpo_lab.core.pairs import Pair

FIELDS = ("prompt", "chosen", "rejected")


class OnBadRow(str, Enum):
    """What to do with a row that is no pair."""

    error = "error"
    skip = "skip"


class BadRow(ValueError):
    """A row that is no pair; the message names file and line."""


def read_pairs(path: Path, on_bad_row: OnBadRow, counts: Counter[str]) -> list[Pair]:
    """All pairs of the file in order; identical sides and repeated pairs are dropped and counted.

    Raises BadRow at the first bad row unless on_bad_row is skip, which counts them.
    """
    pairs: dict[str, Pair] = {}
    for line_number, line in _lines(path):
        counts["rows"] += 1
        try:
            pair = _parse(line)
        except ValueError as error:
            if on_bad_row is OnBadRow.error:
                raise BadRow(
                    f"{path}:{line_number}: {error}; mend the row, or type data.on_bad_row=skip to leave such rows out"
                ) from None
            counts["dropped: bad row"] += 1
            continue
        if pair.chosen == pair.rejected:
            counts["dropped: identical sides"] += 1
        elif pair.key in pairs:
            counts["dropped: duplicate"] += 1
        else:
            pairs[pair.key] = pair
    return list(pairs.values())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise BadRow(f"data.path={path}: {error.strerror}; type the path of a JSONL file") from None


def _parse(line: bytes) -> Pair:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    for name in FIELDS:
        if name not in row:
            raise ValueError(f"field '{name}' is missing (the row has {', '.join(map(repr, row)) or 'none'})")
        if not isinstance(row[name], str):
            raise ValueError(f"field '{name}' is {type(row[name]).__name__}, not a string")
        if name != "prompt" and not row[name].strip():
            raise ValueError(f"field '{name}' is empty")
    return Pair(row["prompt"], row["chosen"], row["rejected"])
