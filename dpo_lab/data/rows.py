"""Rows of the user's files or of a Hugging Face data set, in chunks, each row with its place."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

CHUNK = 1024  # rows
# What a damaged file raises, beside ValueErrors; pyarrow's errors are of these kinds
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)


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
        try:
            row = json.loads(row.rstrip().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise ValueError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
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
            except (*UNREADABLE, ValueError) as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise BadData(
                    f"{file}: can't be read after {number} ({reason}); mend the file or fetch it again"
                ) from None
            yield Chunk(str(file), [], [], size - held)

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(_suffix(file).encode())
            add_file(digest, file)
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
        text = _plain(file, raw)  # held, since one that is let go may close the file under it
        lines = ((i, line.removeprefix(b"\xef\xbb\xbf") if i == 1 else line) for i, line in enumerate(text, start=1))
        yield from _chunked(((number, line) for number, line in lines if line.strip()), raw)


def _json(file: Path) -> Read:
    """One array of objects; what is no array is read as JSON lines."""
    with file.open("rb") as raw:
        text = _plain(file, raw)
        first = text.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        yield from _json_lines(file)
        return
    with file.open("rb") as raw:
        rows = json.loads(_plain(file, raw).read().decode("utf-8-sig"))
        yield from _cut(rows, raw.tell())


def _csv(file: Path) -> Read:
    csv.field_size_limit(2**31 - 1)
    with file.open("rb") as raw:
        # what is not UTF-8 goes on as lone surrogates, which are refused with the row's number
        text = io.TextIOWrapper(_plain(file, raw), "utf-8-sig", "surrogateescape", newline="")  # type: ignore[arg-type]
        reader = csv.DictReader(text, delimiter="\t" if _suffix(file) == ".tsv" else ",")
        yield from _chunked(_with_first_lines(reader), raw)


def _with_first_lines(reader: csv.DictReader) -> Iterator[tuple[int, Any]]:
    """Each row with the line that it begins on; the first is that of the names."""
    line = 2
    for row in reader:
        yield line, row
        line = reader.line_num + 1


def _chunked(rows: Iterator[tuple[int, Any]], raw: Any) -> Read:
    while part := list(islice(rows, CHUNK)):
        numbers, chunk = zip(*part, strict=True)
        yield numbers, chunk, raw.tell()


def _parquet(file: Path) -> Read:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    yield from _batches(table.iter_batches(CHUNK), file.stat().st_size / max(1, table.metadata.num_rows))


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
        for start in range(0, batch.num_rows, CHUNK):
            rows = batch.slice(start, CHUNK).to_pylist()
            numbers = range(done + 1, done + 1 + len(rows))
            done += len(rows)
            yield numbers, rows, int(done * bytes_a_row)


def _cut(rows: list[Any], size: int) -> Read:
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        yield range(start + 1, start + 1 + len(part)), part, size * (start + len(part)) // len(rows)


READERS = {
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".arrow": _arrow,
    ".feather": _arrow,
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def _plain(file: Path, raw: Any) -> io.BufferedIOBase:
    """The content of an open file, decompressed by the file's suffix."""
    match file.suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw


def _suffix(file: Path) -> str:
    """What says how a file is read: its suffix, before that of compression."""
    return (Path(file.stem) if file.suffix in COMPRESSED else file).suffix.lower()


def _may_be_on_the_hub(path: str) -> bool:
    """Whether a path that does not exist has the form of a name on the hub: name or owner/name, no suffix of a data file."""
    parts = path.split("/")
    is_file = _suffix(Path(path)) in (*READERS, ".jsonl", ".ndjson") or Path(path).suffix in COMPRESSED
    return len(parts) <= 2 and all(parts) and not is_file and not path.startswith((".", "~"))


def add_file(digest: Any, file: Path) -> None:
    """Let a hash see a file's bytes."""
    with file.open("rb") as opened:
        hashlib.file_digest(opened, lambda: digest)
