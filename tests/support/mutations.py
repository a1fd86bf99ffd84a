"""Files of preference rows gone wrong: rows of every shape, in every kind of file, damaged as values, as text or as bytes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from hypothesis import strategies as st

FORMATS = Path(__file__).resolve().parent.parent / "fixtures" / "formats"
ORCA = {"columns": {"prompt": "question", "system": "system"}, "as_chat": True}
OBJECTS = {"columns": {"prompt": "instruction", "responses": "completions"}}
SUMMARIES = {
    "columns": {"prompt": "info.post", "chosen": "summaries.0.text", "rejected": "summaries.1.text", "label": "choice"},
    "label_is": "index",
}
SHP = {"columns": {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B", "label": "labels"}}
SHAPES: list[tuple[str, dict[str, Any], str]] = [  # the name of its rows, how they are read, and by which tokenizer
    ("text", {}, "plain"),
    ("text", {"as_chat": True}, "chatml"),
    ("text", {"columns": {"score_chosen": "score_chosen", "score_rejected": "score_rejected"}}, "begins"),
    ("implicit_text", {}, "begins"),
    ("hh_rlhf", {}, "plain"),
    ("hh_rlhf", {"as_chat": True}, "llama3"),
    ("tldr", {"format": "preference"}, "plain"),
    ("tldr", {"format": "text", "columns": {"text": "chosen"}}, "plain"),
    ("shp", SHP, "plain"),
    ("orca_dpo_pairs", ORCA, "chatml"),
    ("chat", {}, "chatml"),
    ("chat", {}, "gemma"),
    ("chat", {}, "plain"),  # which has no template
    ("implicit_chat", {}, "mistral"),
    ("sharegpt", {}, "chatml"),
    ("tools", {}, "chatml"),
    ("ultrafeedback_binarized", {}, "llama3"),
    ("ratings", {"pick": "all"}, "plain"),
    ("ratings", {"pick": "best_rest", "as_chat": True}, "chatml"),
    ("rated_objects", OBJECTS, "plain"),
    ("summarize_from_feedback", SUMMARIES, "plain"),
]
TABLES = ("text", "implicit_text", "hh_rlhf", "tldr", "shp", "orca_dpo_pairs")  # whose rows have no lists in them

TEXT_KINDS = (".jsonl", ".ndjson", "", ".json", ".csv", ".tsv")
ARROW_KINDS = (".parquet", ".arrow", ".feather")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, 1, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}

# Values that Python's json does not write, or not readily: they stand in for themselves until the text is made.
WRITTEN = {
    "\x01deep list": "[" * 600 + "]" * 600,
    "\x01deeper list": "[" * 10_000 + "]" * 10_000,
    "\x01deep object": '{"a":' * 600 + "1" + "}" * 600,
    "\x01never closed": "[" * 10_000,
    "\x01long number": "9" * 5000,
    "\x01large exponent": "1e999",
    "\x01lone surrogate": '"\\ud800"',
    "\x01NUL": '"a\\u0000b"',
    "\x01twice": '"a", "chosen": "b", "chosen": "c"',
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, 10**400, -(10**400), 1e308, -1e308, 3e38, 5e-324, float("nan"), float("inf"),
    "", "  ", "\n", "x", "12", "1e999", "nan", "=1+1", "\u2028", "🙂", "e\u0301", "<|im_end|>", "\ufeff", "\x1b[31m",
    "x" * 5000, "two\nlines", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
    [], {}, [[]], [None], ["x"], [1, 2], {"a": {}}, list(range(100)), {"x" * 3000: 1, "two\nnames": 2},
    {f"name {i}": i for i in range(200)},
    [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    {"role": "assistant", "content": " "}, {"role": "wizard\n", "content": "a"}, {"role": "assistant"},
    {"role": None, "content": "a"}, {"role": 3, "content": "a"}, {"content": "a"}, {"role": "assistant", "content": 3},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": [{"type": "im\nage"}]},
    {"role": "assistant", "tool_calls": "x"}, {"role": "assistant", "tool_calls": [{}]},
    {"role": "assistant", "content": "a", "\ud800": 1}, {"role": "assistant", "content": None, "tool_calls": [["\ud800"]]},
    {"role": "assistant", "tool_calls": [{"\ud800": 1}]}, {"from": "gpt\n", "value": "a"}, {"from": [], "value": "a"},
    {"from": "x" * 3000, "value": "a"}, {"from": "gpt", "value": None}, {"text": "a", "score": "x"},
    {"response": 3, "rating": 1}, *WRITTEN,
]  # fmt: skip
ODD_IN_ARROW = [
    b"\xff\x00", b"text", datetime(2026, 11, 20, tzinfo=UTC), datetime(1, 1, 1), Decimal("1.5"),
    [{"role": "user", "content": "q", "timestamp": datetime(2026, 11, 20)}], {"role": "assistant", "content": b"\xff"},
]  # fmt: skip
ODD_TEXT = [
    "\0", "\ufeff", "\u2028", "\x85", "\x0b", "\x1a", "\x1e", "\r", "\r\n", "\n", "\n\n", "\\ud800", "\\u0000", "\\x", "\\",
    '"', '""', "'", ",", "\t", ":", "{", "}", "[", "]", "NaN", "-Infinity", "null", "1e999", "9" * 5000, "x" * 3000,
    '"chosen": 1, ', "\ufffe", "🙂", "e\u0301", "\x1b[2J", "//", "[" * 10_000, '{"a":' * 10_000, "[" * 900 + "]" * 900,
]  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7", "cp037")


@dataclass(frozen=True)
class Damaged:
    """A file as it lies there, how it is to be read, and what was done to it."""

    name: str
    content: bytes
    shape: dict[str, Any]
    family: str
    skips: bool
    done: str = ""
    beside: dict[str, bytes] = field(default_factory=dict)  # the other files of its folder, which is then what is read

    @property
    def place(self) -> str:
        """What errors name at least: the file, or its folder."""
        return "rows" if self.beside else self.name

    def row(self, told: str) -> int:
        """The number of the row that a line names, 0 of none."""
        found = re.search(rf"({re.escape(self.place)}|{re.escape(self.name)}):(\d+): ", told)
        return int(found[2]) if found else 0


@cache
def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of a shape; of plain text also those of the file that FUZZ_ROWS names, as far as they are short."""
    rows = [json.loads(line) for line in (FORMATS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    if name == "text":
        rows = [row | {"score_chosen": "4.5", "score_rejected": i} for i, row in enumerate(rows)]
        if more := os.environ.get("FUZZ_ROWS"):
            lines = [line for line in Path(more).read_text(encoding="utf-8").splitlines() if len(line) < 1500]
            rows += [json.loads(line) | {"score_chosen": 1, "score_rejected": "0"} for line in lines[:60]]
    return rows


def content_of(rows: Sequence[Any], kind: str) -> bytes:
    """The rows as a file of that kind holds them; what it can't hold as it is becomes JSON in it."""
    if kind in (".jsonl", ".ndjson", ""):
        return "".join(_json(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    if kind == ".json":
        return ("[\n" + ",\n".join(map(_json, rows)) + "\n]\n").encode("utf-8", "surrogatepass")
    objects = [row if isinstance(row, dict) else {"value": row} for row in rows]
    names = list(dict.fromkeys(name for row in objects for name in row))
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerows([names, *([row.get(name, "") for name in names] for row in objects)])
        return text.getvalue().encode("utf-8", "surrogatepass")
    try:
        return _arrow_content(_table(objects, names, _column), kind)
    except pa.ArrowException:  # an object without fields is none of Parquet's types
        return _arrow_content(_table(objects, names, _as_text), kind)


def _table(rows: Sequence[Any], names: Sequence[str], column: Callable[[list[Any]], pa.Array]) -> pa.Table:
    return pa.table({_storable(name): column([row.get(name) for row in rows]) for name in names})


def _arrow_content(table: pa.Table, kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == ".parquet":
        pa.parquet.write_table(table, sink, row_group_size=2)
    elif kind == ".feather":
        pa.feather.write_feather(table, sink, chunksize=2)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _json(row: Any) -> str:
    text = json.dumps(row)
    for stands, written in WRITTEN.items():
        text = text.replace(json.dumps(stands), written)
    return text


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # they are of several types
        return _as_text(values)


def _as_text(values: list[Any]) -> pa.Array:
    return pa.array([_storable(json.dumps(value, default=str)) for value in values])


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@st.composite
def sources(draw: st.DrawFn) -> tuple[list[Any], str, str, dict[str, Any], str]:
    """Some rows, the kind of file and of compression that they go into, how they are read, by which tokenizer."""
    name, shape, family = draw(st.sampled_from(SHAPES))
    table = name in TABLES
    kind = draw(st.sampled_from([k for k in TEXT_KINDS + ARROW_KINDS if table or k not in (".csv", ".tsv")]))
    compression = draw(st.sampled_from(("", "", "", *COMPRESS))) if kind in TEXT_KINDS else ""
    every = rows_of(name)
    picks = draw(
        st.lists(st.integers(0, len(every) - 1), min_size=0 if draw(st.integers(0, 20)) == 20 else 1, max_size=4)
    )
    return [every[i] for i in picks], kind, compression, shape, family


def _as_file(
    kind: str, compression: str, shape: dict, family: str, draw: st.DrawFn, content: bytes, done: str
) -> Damaged:
    return Damaged(f"x{kind}{compression}", content, shape, family, draw(st.booleans()), done)


def _place(draw: st.DrawFn, length: int) -> int:
    return draw(st.integers(0, max(0, length)))


@st.composite
def damaged_bytes(draw: st.DrawFn) -> Damaged:
    """Bytes cut, flipped, taken out, doubled, put in, under the compression, over it, or of another kind altogether."""
    rows, kind, compression, shape, family = draw(sources())
    content, done = content_of(rows, kind), []
    for layer in ("inside", "outside"):
        for what in draw(st.lists(st.sampled_from(sorted(BYTES)), max_size=2)):
            content = BYTES[what](draw, content)
            done.append(f"{what} {layer}")
        if layer == "inside":
            pack = draw(st.sampled_from((compression, compression, compression, *COMPRESS))) if compression else ""
            content = COMPRESS[pack](content)
    return _as_file(kind, compression, shape, family, draw, content, ", ".join(done))


def _span(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    at = _place(draw, len(content))
    return at, min(len(content), at + draw(st.integers(1, 40)))


def _cut(draw: st.DrawFn, content: bytes) -> bytes:
    return content[: _place(draw, len(content))]


def _flip(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if changed:
            changed[_place(draw, len(changed) - 1)] ^= draw(st.integers(1, 255))
    return bytes(changed)


def _tail(draw: st.DrawFn, content: bytes) -> bytes:
    """Near the end, where Parquet and Arrow keep what they hold."""
    changed = bytearray(content)
    if changed:
        changed[-1 - draw(st.integers(0, min(len(changed) - 1, 60)))] ^= draw(st.integers(1, 255))
    return bytes(changed)


def _take(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + content[end:]


def _double(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:end] + content[start:end] * draw(st.sampled_from((1, 1, 50))) + content[end:]


def _zero(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + draw(st.sampled_from((b"\0", b"\xff"))) * (end - start) + content[end:]


def _insert(draw: st.DrawFn, content: bytes) -> bytes:
    at = _place(draw, len(content))
    return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]


BYTES: dict[str, Callable[[st.DrawFn, bytes], bytes]] = {
    "cut": _cut,
    "flipped": _flip,
    "flipped near the end": _tail,
    "a span gone": _take,
    "a span doubled": _double,
    "a span blanked": _zero,
    "put in": _insert,
    "empty": lambda draw, content: b"",
    "twice": lambda draw, content: content + content,
    "halves swapped": lambda draw, content: content[len(content) // 2 :] + content[: len(content) // 2],
    "of another kind": lambda draw, content: content_of(
        rows_of("text"), draw(st.sampled_from(TEXT_KINDS + ARROW_KINDS))
    ),
}


@st.composite
def damaged_text(draw: st.DrawFn) -> Damaged:
    """Characters that do not belong there, other line ends, other encodings."""
    rows, kind, compression, shape, family = draw(sources().filter(lambda source: source[1] in TEXT_KINDS))
    text, done = content_of(rows, kind).decode("utf-8", "surrogatepass"), []
    for _ in range(draw(st.integers(0, 3))):
        at, odd = _place(draw, len(text)), draw(st.sampled_from(ODD_TEXT))
        text = text[:at] + odd + text[at:]
        done.append(f"{odd[:20]!r} put in")
    if draw(st.integers(0, 2)) == 2:
        end = draw(st.sampled_from(("\r\n", "\r", "\u2028", "\x85", "\n\n\n", "", "\0")))
        text = text.replace("\n", end)
        done.append(f"lines end in {end!r}")
    encoding = draw(st.sampled_from(("utf-8", "utf-8", *ENCODINGS)))
    content = text.encode(encoding, "replace")
    return _as_file(
        kind, compression, shape, family, draw, COMPRESS[compression](content), ", ".join([*done, encoding])
    )


@st.composite
def damaged_rows(draw: st.DrawFn) -> Damaged:
    """Fields gone, renamed, swapped, null, of another type, wrapped, nested, and values that no field expects."""
    rows, kind, compression, shape, family = draw(sources())
    done = []
    for _ in range(draw(st.integers(1, 3))):
        places = _places(rows)
        at, what = draw(st.sampled_from(places)), draw(st.sampled_from(CHANGES))
        odd = draw(st.sampled_from(ODD + ODD_IN_ARROW if kind in ARROW_KINDS else ODD))
        other = draw(st.sampled_from(places))
        rows = _changed(rows, at, what, odd, _at(rows, other))
        done.append(f"{'.'.join(map(str, at))} {what}")
        if not isinstance(rows, list):
            rows = [rows]
    content = COMPRESS[compression](content_of(rows, kind))
    return _as_file(kind, compression, shape, family, draw, content, ", ".join(done))


@st.composite
def damaged_folders(draw: st.DrawFn) -> Damaged:
    """A data set of the `datasets` library: one damaged file of what it saved, or a damaged file among others."""
    if draw(st.booleans()):
        file = draw(st.one_of(damaged_bytes(), damaged_rows()))
        return replace(file, name=f"train{file.name.removeprefix('x')}", beside={"README.md": b"# Pairs\n"})
    name, shape, family = draw(st.sampled_from(SHAPES))
    files = dict(_saved(name, in_splits=draw(st.booleans())))
    damaged, done = draw(st.sampled_from(sorted(files))), draw(st.sampled_from(sorted(BYTES)))
    content = BYTES[done](draw, files.pop(damaged))
    return Damaged(damaged, content, shape, family, draw(st.booleans()), done, files)


@cache
def _saved(name: str, in_splits: bool) -> dict[str, bytes]:
    """The files that save_to_disk writes of the rows of a shape."""
    import datasets

    rows = rows_of(name)
    found = datasets.Dataset(_table(rows, list(rows[0]), _column))
    with TemporaryDirectory() as folder:
        (datasets.DatasetDict(train=found) if in_splits else found).save_to_disk(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


CHANGES = (
    "odd",
    "odd",
    "odd",
    "gone",
    "renamed",
    "null",
    "of another",
    "in a list",
    "in an object",
    "as text",
    "twice",
)
Place = tuple[Any, ...]


def _places(value: Any, at: Place = ()) -> list[Place]:
    """Where all that a nesting is made of lies in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in list(inner)[:30] for place in _places(item, (*at, key)))]


def _at(value: Any, place: Place) -> Any:
    for step in place:
        value = value[step]
    return value


def _changed(value: Any, place: Place, what: str, odd: Any, other: Any) -> Any:
    """The nesting with one place changed; what it is made of stays as it is."""
    if not place:
        match what:
            case "null":
                return None
            case "of another":
                return other
            case "in a list":
                return [value]
            case "in an object":
                return {"value": value}
            case "as text":
                return json.dumps(value, default=str)
            case "twice" if isinstance(value, list | str):
                return value + value
        return odd
    step, *rest = place
    if not rest and what in ("gone", "renamed"):
        if isinstance(value, list):
            return [item for i, item in enumerate(value) if i != step]
        return {(f"{key}_" if key == step else key): v for key, v in value.items() if key != step or what == "renamed"}
    items = dict(value) if isinstance(value, dict) else list(value)
    items[step] = _changed(value[step], tuple(rest), what, odd, other)
    return items
