"""Read rows of JSON lines and of CSV one at a time, in bounded memory, and of a JSON array of a bounded size."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from dpo_lab.data.messages import UNREADABLE

LONGEST = 1 << 23  # bytes (or characters) of a row, more than the context of any model
PIECE = 1 << 16  # bytes to read at a time
LARGEST_ARRAY = 1 << 29  # bytes of a JSON array, decompressed
TOO_LONG = f"longer than {LONGEST >> 20} MiB"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SPACE = re.compile(r"[ \t\n\r]*")

Numbered = Iterator[tuple[int, Any, int]]  # number of a row, the row, and its size in the file


class TooLarge(ValueError):
    """Raised for a file that is larger than what is read into memory; the message says what to type."""


def decompressed(file: Path, raw: Any) -> io.BufferedIOBase:
    """Return an open file decompressed by its suffix. Keep a reference: it closes the file when collected."""
    match file.suffix.lower():
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


def json_lines(opened: io.BufferedIOBase) -> Numbered:
    """Yield each line that is not blank, as bytes; a line that is too long is truncated, see `from_json`."""
    for number in count(1):
        line = rest = opened.readline(LONGEST + 1)
        while len(line) > LONGEST and rest and not rest.endswith(b"\n"):
            rest = opened.readline(PIECE)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line, len(line)


def from_json(line: bytes) -> Any:
    """Parse a line of JSON; raise ValueError, with the location of the error, if that fails."""
    if len(line) > LONGEST:
        raise ValueError(TOO_LONG)
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    except ValueError:  # Python's limit of digits
        raise ValueError("not JSON that can be read (an integer of thousands of digits)") from None


def is_array(opened: io.BufferedIOBase) -> bool:
    """Return whether a file of JSON is one array; raise TooLarge if it is and has more than LARGEST_ARRAY bytes."""
    start = opened.read(PIECE)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"[":
        return False
    size = len(start)
    while piece := opened.read(1 << 20):  # the size of a compressed file says nothing of what it unpacks to
        size += len(piece)
        if size > LARGEST_ARRAY:
            raise TooLarge(
                f"a JSON array of more than {LARGEST_ARRAY >> 20} MiB, which would be kept in memory whole;"
                " convert it to JSON lines, which are streamed: type e.g. jq -c '.[]' FILE.json > FILE.jsonl"
            )
    return True


def json_array(opened: io.BufferedIOBase) -> Numbered:
    """Yield the items of the one array in a file; raise ValueError, naming the line, if it is not one array.

    All of the text is in memory, and its items are parsed one after another.
    """
    try:
        text = opened.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the file") from None

    def skip_space(at: int) -> int:
        return SPACE.match(text, at).end()  # type: ignore[union-attr]

    def error_at(at: int, what: str) -> ValueError:
        return ValueError(f"line {1 + text.count(chr(10), 0, at)}: {what}")

    at = skip_space(skip_space(text.startswith("\ufeff")) + 1)
    for number in count(1):
        if number == 1 and text.startswith("]", at):
            break
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise error_at(error.pos, f"not JSON ({error.msg}, in row {number})") from None
        except RecursionError:
            raise error_at(at, f"row {number} is nested too deeply") from None
        except ValueError:  # Python's limit of digits
            raise error_at(at, f"row {number} has an integer of thousands of digits") from None
        if end - at > LONGEST:
            raise error_at(at, f"row {number} is {TOO_LONG}")
        yield number, value, end - at
        at = skip_space(end)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise error_at(at, f"not JSON (',' or ']' expected after row {number})")
        at = skip_space(at + 1)
    at = skip_space(at + 1)
    if at < len(text):
        raise error_at(at, "not JSON (something follows the array)")


def table(opened: io.BufferedIOBase, delimiter: str) -> Numbered:
    """Yield rows of CSV by the names in the first row, with the line on which each begins; extra cells have the key
    None.
    """
    # bytes that are not UTF-8 become lone surrogates, which raise an error with the number of the row
    text = io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="")  # type: ignore[arg-type]
    csv.field_size_limit(LONGEST)
    reader = csv.reader(_short(text), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # for example a quote that is not closed
            raise ValueError(f"line {line}: not CSV ({error})") from None
        if cells is None:
            text.detach()  # else it closes the file when it is collected
            return
        if cells and names is None:
            names = cells
            if any(map(UNREADABLE.search, names)):
                raise ValueError(f"line {line}: the column names are not text in UTF-8")
        elif cells:
            row: dict[str | None, Any] = dict(zip_longest(names or [], cells[: len(names or [])]))
            if len(cells) > len(names or []):
                row[None] = cells[len(names or []) :]
            yield line, row, sum(map(len, cells))


def _short(text: io.TextIOWrapper) -> Iterator[str]:
    for number in count(1):
        line = text.readline(LONGEST + 1)
        if len(line) > LONGEST:
            raise ValueError(f"line {number} is {TOO_LONG}")
        if not line:
            return
        yield line
