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

LONGEST = 1 << 23  # bytes (or characters) of a row; of a pair that is more than any model reads
PIECE = 1 << 16  # bytes that are read at a time
TOO_LONG = f"longer than {LONGEST >> 20} MiB"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SPACE = re.compile(r"[ \t\n\r]*")

Numbered = Iterator[tuple[int, Any, int]]  # a row's number, the row, and how much of the file it took


def decompressed(file: Path, raw: Any) -> io.BufferedIOBase:
    """The content of an open file, decompressed by the file's suffix. To be held: what is let go closes the file under
    it.
    """
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
    """Each line that is not blank, as bytes; of one that is too long as much as shows that it is, see `from_json`."""
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
    """What a line of JSON says. Raises ValueError, whose message tells where it says nothing."""
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
    except ValueError:  # Python's limit
        raise ValueError("not JSON that can be read (a whole number of thousands of digits)") from None


def begins_array(opened: io.BufferedIOBase) -> bool:
    return opened.read(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def json_array(opened: io.BufferedIOBase) -> Numbered:
    """The items of the one array that a file holds. Raises ValueError, naming the line, where it is none."""
    ahead = JsonArrayReader(opened)
    ahead.at += ahead.next() == "["
    for number in count(1):
        if number == 1 and ahead.next() == "]":
            break
        yield number, *ahead.value(f"row {number}")
        if (after := ahead.next()) == "]":
            break
        if after != ",":
            raise ValueError(f"{ahead.line}: not JSON (',' or ']' expected after row {number})")
        ahead.at += 1
    ahead.at += 1
    if ahead.next():
        raise ValueError(f"{ahead.line}: not JSON (something follows the array)")


class JsonArrayReader:
    """The text of a file, of which no more is held than is being read. at: where in it the reader is."""

    def __init__(self, opened: io.BufferedIOBase) -> None:
        self.text, self.at = "", 0
        self._opened, self._decoder, self._is_all = opened, codecs.getincrementaldecoder("utf-8")(), False
        self._bytes = self._lines = 0  # read; left behind
        self._more()
        self.at += self.text.startswith("\ufeff")

    @property
    def line(self) -> str:
        return f"line {1 + self._lines + self.text.count(chr(10), 0, self.at)}"

    def next(self) -> str:
        """The next character that is no white space, empty at the end of the file; `at` is its place."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self._is_all:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self, name: str) -> tuple[Any, int]:
        """The next value, and how many characters it has."""
        self.next()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:  # unless it only ends too early
                if self._is_all or len(self.text) - self.at > LONGEST:
                    self.at = error.pos
                    what = f"not JSON ({error.msg}, in {name})"
                    raise ValueError(
                        f"{self.line}: {'' if self._is_all else f'{name} is {TOO_LONG}, or '}{what}"
                    ) from None
            except RecursionError:
                raise ValueError(f"{self.line}: {name} is nested too deeply") from None
            except ValueError:  # Python's limit
                raise ValueError(f"{self.line}: {name} has a whole number of thousands of digits") from None
            else:
                if end < len(self.text) or self._is_all:  # a number could go on
                    size, self.at = end - self.at, end
                    if size > LONGEST:
                        raise ValueError(f"{self.line}: {name} is {TOO_LONG}")
                    return value, size
            self._more()

    def _more(self) -> None:
        """Read on: as much again as is held, so that a long value is not read over and over."""
        self._lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        piece = self._opened.read(max(PIECE, len(self.text)))
        begun = self._bytes - len(self._decoder.getstate()[0])
        self._bytes, self._is_all = self._bytes + len(piece), not piece
        try:
            self.text += self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {begun + error.start} of the file") from None


def table(opened: io.BufferedIOBase, delimiter: str) -> Numbered:
    """Rows of CSV by the names in the first, each with the line that it begins on; cells beyond the names are under
    None.
    """
    # what is not UTF-8 goes on as lone surrogates, which are refused with the row's number
    text = io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="")  # type: ignore[arg-type]
    csv.field_size_limit(LONGEST)
    reader = csv.reader(_short(text), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # a quote that nothing closes swallows what follows it
            raise ValueError(f"line {line}: not CSV ({error})") from None
        if cells is None:
            text.detach()  # it would close the file
            return
        if cells and names is None:
            names = cells
            if any(map(UNREADABLE.search, names)):
                raise ValueError(f"line {line}: the names there are not text in UTF-8")
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
