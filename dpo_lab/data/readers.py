"""The rows of one file as it lies there: JSON lines, JSON, CSV, Parquet, Arrow, as they are or compressed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_lab.data.text import (
    COMPRESSED,
    LONGEST,
    TOO_LONG,
    Numbered,
    begins_array,
    decompressed,
    json_array,
    json_lines,
    table,
)

CHUNK = 1024  # rows

Read = Iterator[tuple[Sequence[int], Sequence[Any], int]]  # numbers, rows, how many bytes of the file were read so far


def read(file: Path) -> Read:
    """The rows of a file, by its suffix; of one that says nothing they are lines of JSON, each yet to be read.

    Raises what the system, a codec or pyarrow raises of a file that is none of its kind, and ValueError.
    """
    return READERS.get(suffix(file), _json_lines)(file)


def _json_lines(file: Path) -> Read:
    yield from _text(file, json_lines)


def _json(file: Path) -> Read:
    """One array of objects; what is no array is read as JSON lines."""
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        is_array = begins_array(opened)
    yield from _text(file, json_array if is_array else json_lines)


def _csv(file: Path) -> Read:
    yield from _text(file, partial(table, delimiter="\t" if suffix(file) == ".tsv" else ","))


def _text(file: Path, rows: Callable[[io.BufferedIOBase], Numbered]) -> Read:
    numbers: list[int] = []
    chunk: list[Any] = []
    held = 0
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        for number, row, size in rows(opened):
            numbers.append(number)
            chunk.append(row)
            held += size
            if len(chunk) == CHUNK or held > LONGEST:
                yield numbers, chunk, raw.tell()
                numbers, chunk, held = [], [], 0
        if chunk:
            yield numbers, chunk, raw.tell()


def _parquet(file: Path) -> Read:
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    told = opened.metadata
    groups = [told.row_group(i) for i in range(told.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    batches = opened.iter_batches(rows_at_once(largest))
    yield from _batches(batches, file.stat().st_size / max(1, told.num_rows))


def _arrow(file: Path) -> Read:
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            mapped.seek(0)
            batches = iter(pa.ipc.open_stream(mapped))
        yield from _batches(batches, 0)


def _batches(batches: Iterator[Any], bytes_a_row: float) -> Read:
    done = 0
    for batch in batches:
        batch.validate(full=True)  # what is read is believed otherwise, offsets beyond its end as well
        step = rows_at_once(batch.nbytes / max(1, batch.num_rows))
        for start in range(0, batch.num_rows, step):
            rows = batch.slice(start, step).to_pylist()
            numbers = range(done + 1, done + 1 + len(rows))
            done += len(rows)
            yield numbers, rows, int(done * bytes_a_row)


def rows_at_once(bytes_a_row: float) -> int:
    """As many rows as are held at a time. Raises ValueError where one alone is too long."""
    if bytes_a_row > LONGEST:
        raise ValueError(f"rows are {TOO_LONG}")
    return max(1, min(CHUNK, int(LONGEST / max(1, bytes_a_row))))


READERS: dict[str, Callable[[Path], Read]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".arrow": _arrow,
    ".feather": _arrow,
}


def suffix(file: Path) -> str:
    """What says how a file is read: its suffix, before that of compression."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).suffix.lower()
