"""Stream rows of JSON lines, of a JSON array and of CSV, one at a time, in bounded memory."""

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
TOO_LONG = f"longer than {LONGEST >> 20} MiB"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SPACE = re.compile(r"[ \t\n\r]*")

Numbered = Iterator[tuple[int, Any, int]]  # number of a row, the row, and its size in the file


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


def begins_array(opened: io.BufferedIOBase) -> bool:
    return opened.read(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def json_array(opened: io.BufferedIOBase) -> Numbered:
    """Yield the items of the one array in a file; raise ValueError, naming the line, if it is not one array."""
    reader = JsonArrayReader(opened)
    reader.at += reader.next() == "["
    for number in count(1):
        if number == 1 and reader.next() == "]":
            break
        yield number, *reader.value(f"row {number}")
        if (after := reader.next()) == "]":
            break
        if after != ",":
            raise ValueError(f"{reader.line}: not JSON (',' or ']' expected after row {number})")
        reader.at += 1
    reader.at += 1
    if reader.next():
        raise ValueError(f"{reader.line}: not JSON (something follows the array)")


class JsonArrayReader:
    """A reader of JSON values that keeps only the current part of a file in memory. at: its position in `text`."""

    def __init__(self, opened: io.BufferedIOBase) -> None:
        self.text, self.at = "", 0
        self._opened, self._decoder, self._is_all = opened, codecs.getincrementaldecoder("utf-8")(), False
        self._bytes = self._lines = 0  # bytes read so far; lines before `text`
        self._more()
        self.at += self.text.startswith("\ufeff")

    @property
    def line(self) -> str:
        return f"line {1 + self._lines + self.text.count(chr(10), 0, self.at)}"

    def next(self) -> str:
        """Advance `at` to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self._is_all:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self, name: str) -> tuple[Any, int]:
        """Return the next value and its number of characters."""
        self.next()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:  # maybe only because more of the file has to be read
                if self._is_all or len(self.text) - self.at > LONGEST:
                    self.at = error.pos
                    what = f"not JSON ({error.msg}, in {name})"
                    raise ValueError(
                        f"{self.line}: {'' if self._is_all else f'{name} is {TOO_LONG}, or '}{what}"
                    ) from None
            except RecursionError:
                raise ValueError(f"{self.line}: {name} is nested too deeply") from None
            except ValueError:  # Python's limit of digits
                raise ValueError(f"{self.line}: {name} has an integer of thousands of digits") from None
            else:
                if end < len(self.text) or self._is_all:  # else a number may continue in the rest of the file
                    size, self.at = end - self.at, end
                    if size > LONGEST:
                        raise ValueError(f"{self.line}: {name} is {TOO_LONG}")
                    return value, size
            self._more()

    def _more(self) -> None:
        """Read more of the file: as much as is in memory, so that a long value is parsed only a few times."""
        self._lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        piece = self._opened.read(max(PIECE, len(self.text)))
        start = self._bytes - len(self._decoder.getstate()[0])
        self._bytes, self._is_all = self._bytes + len(piece), not piece
        try:
            self.text += self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {start + error.start} of the file") from None


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
