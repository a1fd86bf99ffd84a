"""Read the rows of one file: JSON lines, JSON, CSV, Parquet or Arrow, plain or compressed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_lab.data.media import UNREAD, is_media
from dpo_lab.data.text import (
    COMPRESSED,
    LONGEST,
    TOO_LONG,
    Numbered,
    decompressed,
    is_array,
    json_array,
    json_lines,
    table,
)

CHUNK = 1024  # rows

Read = Iterator[tuple[Sequence[int], Sequence[Any], int]]  # numbers, rows, bytes of the file read so far


def read(file: Path) -> Read:
    """Read the rows of a file by its suffix; with an unknown suffix they are JSON lines, which are not parsed yet.

    Raises ValueError, and the errors of the system, of a codec or of pyarrow for a file that they can't read.
    """
    return READERS.get(suffix(file), _json_lines)(file)


def _json_lines(file: Path) -> Read:
    yield from _text(file, json_lines)


def _json(file: Path) -> Read:
    """Read an array of objects; a file that is not an array is read as JSON lines."""
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        rows = json_array if is_array(opened) else json_lines
    yield from _text(file, rows)


def _csv(file: Path) -> Read:
    yield from _text(file, partial(table, delimiter="\t" if suffix(file) == ".tsv" else ","))


def _text(file: Path, rows: Callable[[io.BufferedIOBase], Numbered]) -> Read:
    numbers: list[int] = []
    chunk: list[Any] = []
    total = 0
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        for number, row, size in rows(opened):
            numbers.append(number)
            chunk.append(row)
            total += size
            if len(chunk) == CHUNK or total > LONGEST:
                yield numbers, chunk, raw.tell()
                numbers, chunk, total = [], [], 0
        if chunk:
            yield numbers, chunk, raw.tell()


def _parquet(file: Path) -> Read:
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    metadata = opened.metadata
    media = [field.name for field in opened.schema_arrow if is_media(field.type)]
    columns = [name for name in opened.schema_arrow.names if name not in media]
    largest = max((_bytes_per_row(metadata.row_group(i), media) for i in range(metadata.num_row_groups)), default=0)
    batches = opened.iter_batches(rows_at_once(largest), columns=columns)
    for numbers, rows, position in _batches(batches, file.stat().st_size / max(1, metadata.num_rows)):
        yield numbers, [row | dict.fromkeys(media, UNREAD) for row in rows], position


def _bytes_per_row(group: Any, media: Sequence[str]) -> float:
    columns = [group.column(i) for i in range(group.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".")[0] not in media]
    return sum(column.total_uncompressed_size for column in read) / max(1, group.num_rows)


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


def _batches(batches: Iterator[Any], bytes_per_row: float) -> Read:
    done = 0
    for batch in batches:
        for rows in rows_of(batch):
            numbers = range(done + 1, done + 1 + len(rows))
            done += len(rows)
            yield numbers, rows, int(done * bytes_per_row)


def rows_of(batch: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of an Arrow table or batch in chunks, with UNREAD in place of bytes.

    Nulls inside a value are left out: Arrow adds them to a row for fields that only other rows have.
    """
    batch.validate(full=True)  # else invalid offsets of a damaged file would be followed
    media = [field.name for field in batch.schema if is_media(field.type)]
    present = [_is_present(batch.column(name)) for name in media]
    text = batch.select([name for name in batch.schema.names if name not in media])
    step = rows_at_once(text.nbytes / max(1, batch.num_rows))
    for start in range(0, batch.num_rows, step):
        rows = [{name: _unpadded(value) for name, value in row.items()} for row in text.slice(start, step).to_pylist()]
        for name, valid in zip(media, present, strict=True):
            for row, is_present in zip(rows, valid[start : start + step], strict=True):
                row[name] = UNREAD if is_present else None
        yield rows


def _is_present(column: Any) -> list[bool]:
    """Return whether each row of a column has a value; an empty list counts as no value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    values = pc.call_function("list_value_length", [column]) if is_list else column.is_valid()
    return [bool(value) for value in values.to_pylist()]


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list) else value


def rows_at_once(bytes_per_row: float) -> int:
    """Return the number of rows per chunk; raise ValueError if a single row is too long."""
    if bytes_per_row > LONGEST:
        raise ValueError(f"rows are {TOO_LONG}")
    return max(1, min(CHUNK, int(LONGEST / max(1, bytes_per_row))))


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
    """Return the suffix that decides how a file is read, without that of a compression."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).suffix.lower()
