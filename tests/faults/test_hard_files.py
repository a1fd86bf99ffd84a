"""Faults 18, 19 and 24 of the matrix, what the fuzz of tests/faults/test_fuzz.py found: each once more, by itself."""

from __future__ import annotations

import gzip
import json
import struct
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from dpo_lab.data.chat import BadChat, Chat
from dpo_lab.data.formats import Pick, Shape
from dpo_lab.data.rows import BadData, open_rows
from dpo_lab.data.text import LONGEST
from tests.data.test_tokenized_cache import LENIENT, store_of
from tests.support.templates import tokenizer_of

pytestmark = pytest.mark.slow

ROW = {"prompt": "p", "chosen": " good", "rejected": " bad"}
GOOD = json.dumps(ROW).encode()
CHAT = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}


def with_message(**entries: Any) -> dict[str, Any]:
    return CHAT | {"prompt": [CHAT["prompt"][0] | entries]}  # type: ignore[index]


def refused(path: Path, content: bytes | None = None, **settings: Any) -> str:
    """The one line that says what is wrong with a file, without the folder that it lies in."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadData) as error:
        store_of(path.parent / "cache", path, **settings)
    message = str(error.value)
    assert message.isprintable()
    return message.replace(f"{path.parent}/", "")


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (b"[" * 10_000 + b"]" * 10_000, "row 2 is nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "row 2 has an integer of thousands of digits"),
        (b'{"prompt": "p" "chosen"', "not JSON (Expecting ',' delimiter, in row 2)"),
        (b'{"prompt": "\xff"}', f"not UTF-8 at byte {len(GOOD) + 15} of the file"),
        (b'{"prompt": "p"} 1', "not JSON (',' or ']' expected after row 2)"),
        (b"]", "not JSON (something follows the array)"),
    ],
)
def test_18_a_json_array_ends_at_its_line(value, what, tmp_path):
    message = refused(tmp_path / "x.json", b"[" + GOOD + b",\n" * (value != b"]") + value + b"\n]")
    assert message.startswith("x.json: can't be read after ")
    assert what in message
    assert "UTF-8" in what or f"line {1 + (value != b']') + (value == b']')}: " in message
    assert message.endswith("; fix the file or download it again")


def test_18_a_row_of_null_in_a_folder_is_a_bad_row(tmp_path):
    """The library's own reader of JSON ends the process with it."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_bytes(lines(ROW, None, ROW))
    assert refused(tmp_path / "rows").startswith("rows/train.jsonl:2: not an object but NoneType; fix the row, or type")


def test_18_a_json_array_is_read_with_its_byte_order_mark_and_letters_of_several_bytes(tmp_path):
    rows = [ROW | {"prompt": f"ä🙂{i} " * i} for i in range(0, 3000, 61)]
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode())
    assert path.stat().st_size > 1 << 19
    chunks = list(open_rows(str(path), None, None, None).chunks())
    assert [row for chunk in chunks for row in chunk.rows] == rows
    assert [number for chunk in chunks for number in chunk.numbers] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(("name", "pack"), [("x.json", bytes), ("x.json.gz", gzip.compress)])
def test_18_a_json_array_that_is_too_large_is_refused_with_what_to_type(name, pack, tmp_path, monkeypatch):
    content = json.dumps([ROW] * 40_000).encode()
    assert len(content) > 2 << 20
    monkeypatch.setattr("dpo_lab.data.text.LARGEST_ARRAY", 2 << 20)
    told = refused(tmp_path / name, pack(content))
    assert told.startswith(f"{name}: a JSON array of more than 2 MiB, which would be kept in memory whole; convert it")
    assert told.endswith("type e.g. jq -c '.[]' FILE.json > FILE.jsonl")
    monkeypatch.setattr("dpo_lab.data.text.LARGEST_ARRAY", len(content))
    assert sum(len(chunk.rows) for chunk in open_rows(str(tmp_path / name), None, None, None).chunks()) == 40_000


def test_18_a_line_that_is_too_long_is_a_bad_row_and_the_others_are_kept(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    content = gzip.compress(lines(ROW, b'{"prompt": "' + b"x" * 2 * LONGEST + b'"}', ROW | {"prompt": "q"}), 1)
    assert "x.jsonl.gz:2: longer than 8 MiB; fix the row, or type data.on_bad_row=skip" in refused(path, content)
    store = store_of(tmp_path / "cache", path, bad=LENIENT)
    assert [store.where(i) for i in range(len(store.table))] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"prompt,chosen,rejected\np, good, bad\nHello, how are you, good, bad\n",
            "x.csv:3: 1 cells more than the first row",
        ),
        (
            b'prompt,chosen,rejected\np, good,"bad\nq, a, b\n',
            "can't be read after 0 (line 2: not CSV (unexpected end of data))",
        ),
        (b'prompt,chosen,rejected\np,"a "quoted" word",b\n', "(line 2: not CSV (',' expected after '\"'))"),
        (b"prompt,chosen,rejected\n\n\np, good,\n", "x.csv:4: field 'rejected' is empty"),
        (b'\n\n"prompt","cho\nsen","rejected"\np, good, bad\n', "x.csv:5: field 'chosen' is missing"),
    ],
)
def test_18_csv_that_is_not_what_it_seems_ends_at_its_line(content, what, tmp_path):
    assert what in refused(tmp_path / "x.csv", content)


def test_18_an_arrow_file_whose_offsets_lead_out_of_it_is_refused(tmp_path):
    """They were followed, to wherever in memory they led."""
    path = tmp_path / "x.feather"
    pa.feather.write_feather(
        pa.table({name: [value] * 3 for name, value in ROW.items()}), path, compression="uncompressed"
    )
    offsets = struct.pack("<4i", *range(0, 20, 5))  # of " good"
    content = path.read_bytes()
    assert content.count(offsets) == 1
    message = refused(path, content.replace(offsets, struct.pack("<4i", 0, 5, 10, 1 << 30)))
    assert message.startswith("x.feather: can't be read after 0 (")


def test_18_what_a_library_says_of_a_file_is_shown_without_its_control_characters(tmp_path):
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({name: [value] for name, value in ROW.items()}), path)
    content = path.read_bytes()
    told = []
    for at in range(len(content) - 300, len(content) - 8):
        path.write_bytes(content[:at] + b"\x0e" + content[at + 1 :])
        try:
            list(open_rows(str(path), None, None, None).chunks())
        except BadData as error:
            told.append(str(error))
    assert any("don't know what type: ?" in message for message in told)
    assert all(message.isprintable() for message in told)


def test_18_rows_of_parquet_that_would_fill_the_memory_are_not_unpacked(tmp_path):
    path = tmp_path / "x.parquet"
    long = pa.array([" good" * (LONGEST // 4)])
    table = pa.table({"prompt": ["p"], "chosen": long, "rejected": [" bad"]})
    pa.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 16
    assert "(rows are longer than 8 MiB)" in refused(path)


def test_18_a_file_that_the_system_does_not_read_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.symlink_to("/proc/self/mem")
    assert "x.jsonl: can't be read (" in refused(path)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (with_message(tool_calls={"\ud800": 1}), "field 'prompt' has a lone surrogate at position 0"),
        (with_message(name={"a\0": 1}), "field 'prompt' has a NUL character at position 1"),
        (with_message(name=...), "nested too deeply"),
        (CHAT | {"tools": [{"a": ...}]}, "nested too deeply"),
        (CHAT | {"tools": "[" * 10_000}, "nested too deeply"),
        (ROW | {"score_chosen": 10**400}, "field 'score_chosen' has 1000"),
        (ROW | {"score_chosen": 1e300}, "field 'score_chosen' has 1e+300 where a number should be"),
        (ROW | {"chosen": [{"role": "wizard\n", "content": "a"}]}, r"(roles 'wizard\n')"),
        (ROW | {"chosen": [{"role": "x" * 9999, "content": "a"}]}, "xxx...)"),
        (ROW | {"chosen": [{"role": "user", "content": [{"type": "im\nage"}]}]}, r"of type 'im\nage'"),
        (ROW | {"prompt": [{f"name {i}": i for i in range(999)}]}, "'name 19', ...)"),
        (b"9" * 5000, "not JSON that can be read (an integer of thousands of digits)"),
    ],
)
def test_19_a_row_that_no_field_expects_is_named_in_one_short_line(row, what, tmp_path):
    deep = b"[" * 600 + b"]" * 600
    line = (row if isinstance(row, bytes) else json.dumps(row, default=lambda _: "...").encode()).replace(
        b'"..."', deep
    )
    message = refused(tmp_path / "x.jsonl", lines(CHAT, line), family="chatml")
    assert message.startswith("x.jsonl:2: ")
    assert what in message
    assert "fix the row, or type data.on_bad_row=skip" in message
    assert len(message) < 1000
    assert len(store_of(tmp_path / "cache", tmp_path / "x.jsonl", bad=LENIENT, family="chatml").table) == 1


@pytest.mark.parametrize("value", [datetime(2026, 11, 20), b"\xff"])
def test_19_what_only_arrow_can_hold_has_no_place_in_a_message(value, tmp_path):
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([with_message(sent=value)]), path)
    kind = type(value).__name__
    assert f"x.parquet:1: field 'prompt' holds {kind} where text, a number or a list should be" in refused(path)


def test_19_the_largest_scores_make_a_margin_that_is_a_number(tmp_path):
    (tmp_path / "x").write_bytes(lines(ROW | {"score_chosen": 1e37, "score_rejected": -1e37}))
    store = store_of(tmp_path / "cache", tmp_path / "x")
    assert np.isfinite(store.table.score_margin).all()


def test_19_a_row_of_several_pairs_that_no_template_takes_is_one_bad_row(tmp_path):
    rated = {"prompt": [{"role": "system", "content": "s"}], "responses": ["a", "b", "c"], "ratings": [1, 2, 3]}
    (tmp_path / "x").write_bytes(lines(CHAT, rated))
    store = store_of(tmp_path / "cache", tmp_path / "x", bad=LENIENT, family="gemma", shape=Shape(pick=Pick.all))
    assert (store.counts["rows"], store.counts["dropped: bad row"]) == (2, 1)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no\n' + messages[0].content) }}", "{{ messages[0].content | int // 0 }}"]
)
def test_19_what_a_template_complains_of_is_one_short_line(template):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    with pytest.raises(BadChat) as error:
        Chat(tokenizer).render([{"role": "user", "content": "\x85 x" * 999}])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_24_a_suffix_in_capitals_is_the_same_suffix(tmp_path):
    path = tmp_path / "X.JSONL.GZ"
    path.write_bytes(gzip.compress(lines(ROW)))
    assert len(store_of(tmp_path / "cache", path).table) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_24_a_table_in_another_encoding_is_told_by_its_names(encoding, tmp_path):
    content = "prompt,chosen,rejected\np, good, bad\n".encode(encoding)
    told = refused(tmp_path / "x.csv", content)
    assert told.startswith(
        "x.csv: can't be read after 0 (line 1: the column names are not text in UTF-8); fix the file"
    )


def test_how_many_rows_were_read_stands_behind_the_bar(tmp_path, capsys):
    (tmp_path / "x").write_bytes(lines(*(ROW | {"prompt": f"p{i}"} for i in range(1234))))
    store_of(tmp_path / "cache", tmp_path / "x")
    assert capsys.readouterr().out.endswith("; 1,234 rows\n")
