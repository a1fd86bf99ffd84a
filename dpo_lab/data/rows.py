"""Rows of the user's files or of a Hugging Face data set, in chunks, each row with its place."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_lab.data.text import (
    COMPRESSED,
    LONGEST,
    TOO_LONG,
    Numbered,
    begins_array,
    decompressed,
    from_json,
    json_array,
    json_lines,
    table,
)

CHUNK = 1024  # rows
SHOWN = 300  # characters of what a library says of a file


class BadData(ValueError):
    """Data that can't be had or are no pairs; the message is one line that names the place and says what to type."""


@dataclass(frozen=True)
class Chunk:
    """Some rows: of `place`, numbered from 1 (lines of a text file, else rows). A row is an object, or a line of JSON yet to
    be read. amount: how much of Rows.total it is.
    """

    place: str
    numbers: Sequence[int]
    rows: Sequence[Any]
    amount: int


class Rows(Protocol):
    """What rows come from. total: how much there is, in the unit of Chunk.amount."""

    total: int

    def chunks(self) -> Iterator[Chunk]: ...

    def digest(self) -> str:
        """A hash of the content, whatever its place is called."""
        ...


def open_rows(path: str | Sequence[str], name: str | None, split: str | None, revision: str | None) -> Rows:
    """The rows of files (a path, a glob, or several) or of a data set (a folder, or a name on the hub)."""
    paths = [path] if isinstance(path, str) else list(path)
    files: list[Path] = []
    for each in paths:
        found = [Path(p) for p in sorted(glob.glob(each, recursive=True))] if glob.has_magic(each) else [Path(each)]
        if any(p.is_dir() for p in found) or (not found[0].exists() if found else False):
            if len(paths) == 1 and len(found) == 1 and (found[0].is_dir() or _may_be_on_the_hub(each)):
                return DatasetRows(each, name, split, revision)
            raise BadData(f"data.path={each}: no such file; type the path of a file, or a data set's name on the hub")
        if not found:
            raise BadData(f"data.path={each}: no file matches; type a path or a pattern that does")
        files += found
    return FileRows(files)


def local_files(path: str | Sequence[str]) -> list[Path]:
    """The files behind a path, a pattern, a folder or several of them; a name on the hub has none."""
    paths = [path] if isinstance(path, str) else list(path)
    found = [
        Path(p) for each in paths for p in (sorted(glob.glob(each, recursive=True)) if glob.has_magic(each) else [each])
    ]
    return [file for each in found for file in (sorted(each.rglob("*")) if each.is_dir() else [each]) if file.is_file()]


def parse(row: Any) -> Mapping[str, Any]:
    """A row as an object. Raises ValueError where it is none."""
    if isinstance(row, bytes):
        row = from_json(row)
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    if None in row:
        raise ValueError(f"{len(row[None])} cells more than the first row has names")
    return row


class FileRows:
    """JSON lines, JSON, Parquet, CSV and Arrow files, by their suffix, as they are or under gzip, zstd, bzip2 or xz."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.total = sum(file.stat().st_size for file in files)

    def chunks(self) -> Iterator[Chunk]:
        for file in self.files:
            rows = READERS.get(_suffix(file), _json_lines)(file)
            size, number, held = file.stat().st_size, 0, 0
            try:
                for numbers, chunk, position in rows:
                    number = numbers[-1]
                    yield Chunk(str(file), numbers, chunk, position - held)
                    held = position
            except Exception as error:  # of a dozen kinds, from system, codecs and pyarrow
                raise _unreadable(file, f" after {number}", error) from error
            yield Chunk(str(file), [], [], size - held)

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(_suffix(file).encode())
            try:
                add_file(digest, file)
            except OSError as error:
                raise _unreadable(file, "", error) from error
        return digest.hexdigest()


class DatasetRows:
    """A data set of the `datasets` library: a name on the hub, a folder of data files, or what save_to_disk wrote."""

    def __init__(self, path: str, name: str | None, split: str | None, revision: str | None) -> None:
        import datasets

        self.place = f"{path}[{split}]" if split else path
        try:
            if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
                found = datasets.load_from_disk(path)
            else:
                found = datasets.load_dataset(path, name, revision=revision)
        except Exception as error:  # of a dozen kinds, from hub, network, cache and files
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise BadData(
                f"data.path={path}: {reason}; type the path of a file, or a data set's name on the hub (data.name= its"
                " configuration)"
            ) from error
        if isinstance(found, datasets.DatasetDict):
            wanted = split or ("train" if "train" in found else "")
            if wanted not in found:
                raise BadData(
                    f"data.split={split}: {path} has no such split; type data.split= one of {', '.join(map(str, found))}"
                )
            found = found[wanted]
        self.data: datasets.Dataset = found  # type: ignore[assignment]
        self.total = len(self.data)

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, len(self.data), CHUNK):
            columns = self.data[start : start + CHUNK]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield Chunk(self.place, range(start + 1, start + 1 + len(rows)), rows, len(rows))

    def digest(self) -> str:
        digest = hashlib.blake2b(f"{self.data.features} {len(self.data)}".encode(), digest_size=16)
        files = [Path(file["filename"]) for file in self.data.cache_files]
        for file in files:
            add_file(digest, file)
        if not files:  # held in memory
            digest.update(self.data._fingerprint.encode())
        return digest.hexdigest()


Read = Iterator[tuple[Sequence[int], Sequence[Any], int]]  # numbers, rows, how many bytes of the file were read so far


def _json_lines(file: Path) -> Read:
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        yield from _chunked(json_lines(opened), raw)


def _json(file: Path) -> Read:
    """One array of objects; what is no array is read as JSON lines."""
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        is_array = begins_array(opened)
    if not is_array:
        yield from _json_lines(file)
        return
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        yield from _chunked(json_array(opened), raw)


def _csv(file: Path) -> Read:
    with file.open("rb") as raw:
        opened = decompressed(file, raw)
        yield from _chunked(table(opened, "\t" if _suffix(file) == ".tsv" else ","), raw)


def _chunked(rows: Numbered, raw: Any) -> Read:
    numbers: list[int] = []
    chunk: list[Any] = []
    held = 0
    for number, row, size in rows:
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
    batches = opened.iter_batches(_rows_at_once(largest))
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
        step = _rows_at_once(batch.nbytes / max(1, batch.num_rows))
        for start in range(0, batch.num_rows, step):
            rows = batch.slice(start, step).to_pylist()
            numbers = range(done + 1, done + 1 + len(rows))
            done += len(rows)
            yield numbers, rows, int(done * bytes_a_row)


def _rows_at_once(bytes_a_row: float) -> int:
    """As many rows as are held at a time. Raises ValueError where one alone is too long."""
    if bytes_a_row > LONGEST:
        raise ValueError(f"rows are {TOO_LONG}")
    return max(1, min(CHUNK, int(LONGEST / max(1, bytes_a_row))))


READERS = {
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".arrow": _arrow,
    ".feather": _arrow,
}


def _suffix(file: Path) -> str:
    """What says how a file is read: its suffix, before that of compression."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def _may_be_on_the_hub(path: str) -> bool:
    """Whether a path that does not exist has the form of a name on the hub: name or owner/name, no suffix of a data file."""
    parts = path.split("/")
    is_file = _suffix(Path(path)) in (*READERS, ".jsonl", ".ndjson") or Path(path).suffix.lower() in COMPRESSED
    return len(parts) <= 2 and all(parts) and not is_file and not path.startswith((".", "~"))


def _unreadable(file: Path, after: str, error: Exception) -> BadData:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    reason = "".join(letter if letter.isprintable() else "?" for letter in reason)[:SHOWN]
    return BadData(f"{file}: can't be read{after} ({reason}); mend the file or fetch it again")


def add_file(digest: Any, file: Path) -> None:
    """Let a hash see a file's bytes."""
    with file.open("rb") as opened:
        hashlib.file_digest(opened, lambda: digest)
