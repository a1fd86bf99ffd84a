"""The metrics log of a run, `metrics.jsonl`: one row per line with a checksum, truncated to a checkpoint on resume.

A row ends with `crc`, the CRC-32 of the line without it, so that any damaged byte is detected. Rows written by earlier
versions have no `crc` and are read unchecked.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_lab.runs.run_record import RunFailed

METRICS_LOG = "metrics.jsonl"
_CRC = ', "crc": "'
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # strict JSON has no such numbers


class MetricsLogError(RunFailed):
    """The metrics log is damaged; the message names file and line and says what to type."""


def append(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append a row: the number of optimizer steps and the metrics. NaN and infinities are written as strings."""
    row = {"step": step} | {name: _to_json(value) for name, value in metrics.items()}
    bare = json.dumps(row, allow_nan=False)[:-1]
    with path.open("ab") as file:
        file.write(f'{bare}{_CRC}{_crc(bare.encode())}"}}\n'.encode())


def rows(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every complete row in order, without an incomplete last line. Raise MetricsLogError for any other damage.

    start: a position in bytes, to read only what was written after it; line numbers in errors count from there.
    """
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, 1):
            is_torn = not line.endswith(b"\n")  # only the last line can be
            if is_torn and _row(line[:-1]) is None:
                return
            row = None if is_torn else _row(line)  # a complete row without its newline is damaged, not torn
            if row is not None:
                yield row
            else:
                raise MetricsLogError(
                    f"{path}:{number}: not a row of this metrics log; fix or delete the line, or delete the run's"
                    " folder and type the same command again"
                )


def position(path: Path, durable: bool = False) -> int:
    """Return the number of bytes written so far, 0 without a file. durable: sync them to the disk first."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        if durable:
            os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def truncate(path: Path, to: int) -> None:
    """Remove the rows after the position `to`. Raise MetricsLogError if the file is shorter than that."""
    if (written := position(path)) < to:
        raise MetricsLogError(
            f"{path}: {written} bytes, but the checkpoint was taken at {to}; rows are missing: restore the file, or"
            " delete the run's folder and type the same command again"
        )
    if written > to:
        with path.open("rb+") as file:
            file.truncate(to)
            os.fsync(file.fileno())


def _row(line: bytes) -> dict[str, Any] | None:
    """Parse a line; return None if it is not a row or its checksum does not match."""
    bare, crc, rest = line.rstrip(b"\n").partition(_CRC.encode())
    if crc and rest != f'{_crc(bare)}"}}'.encode():
        return None
    try:
        row = json.loads(bare + b"}" if crc else bare)
        return {name: _NOT_FINITE[value] if isinstance(value, str) else value for name, value in row.items()}
    except (ValueError, KeyError, AttributeError):
        return None


def _crc(bare: bytes) -> str:
    return f"{zlib.crc32(bare):08x}"


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
