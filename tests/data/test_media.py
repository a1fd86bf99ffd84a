"""Columns of images, sound and video: never opened, seen, and refused where the text refers to them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from dpo_lab.data.formats import Shape
from dpo_lab.data.row_faults import MEDIA
from dpo_lab.data.rows import BadData, open_rows, parse

ROW = {"prompt": "what is this?", "chosen": "a cat", "rejected": "a dog"}
SOUND = {"bytes": b"no sound at all", "path": "a.wav"}


def counted(row: dict, **settings) -> int:
    counts: Counter[str] = Counter()
    Shape(**settings).read(row, counts)
    return counts[MEDIA]


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"images": ["cat.jpg"]}, 1),
        ({"image": {"bytes": None, "path": "cat.jpg"}}, 1),
        ({"audio": b"not read"}, 1),
        ({"video_url": "https://example.org/a.mp4"}, 1),
        ({"input_audios": ["a.wav"]}, 1),
        ({"images": []}, 0),
        ({"images": None}, 0),
        ({"image": {"bytes": None, "path": None}}, 0),
        ({"imagery": "vivid"}, 0),
        ({}, 0),
    ],
)
def test_media_beside_the_text_are_seen(fields, seen):
    assert counted(ROW | fields) == seen


def test_a_column_that_is_read_as_text_is_none():
    row = {"image": "what is this?", "chosen": "a cat", "rejected": "a dog"}
    assert counted(row, columns={"prompt": "image"}) == 0


@pytest.mark.parametrize("mark", ["<image>", "<|image|>", "<image_1>", "<|vision_start|>", "[IMG]", "<start_of_image>"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_text_that_refers_to_an_image_can_not_do_without(mark, is_chat):
    prompt = f"{mark}what is this?"
    row = ROW | {"prompt": [{"role": "user", "content": prompt}] if is_chat else prompt}
    assert counted(row) == 0  # a text about marks, say
    with pytest.raises(
        ValueError, match=r"field 'images' is not read, and the row's text refers to it \(.*\): only text"
    ):
        Shape().read(row | {"images": ["cat.jpg"]})


def rows_of(path: Path) -> list[dict]:
    chunks = open_rows(str(path), None, None, None).chunks()
    return [dict(parse(row)) for chunk in chunks for row in chunk.rows]


@pytest.mark.parametrize("name", ["x.parquet", "x.feather"])
def test_bytes_of_a_file_are_left_where_they_are(name, tmp_path, monkeypatch):
    """However many they are: a row's own text is what may not be too long."""
    monkeypatch.setattr("dpo_lab.data.readers.LONGEST", 2000)
    more = {"sound": {"bytes": bytes(5000), "path": "a.wav"}, "raw": bytes(5000), "pictures": [SOUND]}
    table = pa.Table.from_pylist([ROW | more, ROW | {"sound": None, "raw": None, "pictures": []}])
    write = pa.parquet.write_table if name.endswith("parquet") else pa.feather.write_feather
    write(table, tmp_path / name)
    first, second = rows_of(tmp_path / name)
    assert {key: first[key] for key in ROW} == {key: second[key] for key in ROW} == ROW
    assert {first[key] for key in more} == {b"not read"}
    if name == "x.feather":
        assert [second[key] for key in more] == [None] * 3
    with pytest.raises(ValueError, match="field 'raw' is bytes, not a string"):
        Shape(columns={"prompt": "raw"}).read(first)


def test_what_datasets_saved_is_read_without_being_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    extra = [{"a": None, "b": 1}, "text", None]
    columns = {name: [value] * 3 for name, value in ROW.items()} | {"picture": [SOUND] * 3, "sound": [SOUND] * 3}
    saved = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    saved = saved.cast_column("sound", datasets.Audio())
    saved = saved.add_column("extra", [json.dumps(value) for value in extra]).cast_column("extra", datasets.Json())
    saved.save_to_disk(tmp_path / "saved")
    rows = rows_of(tmp_path / "saved")
    assert [{key: row[key] for key in ROW} for row in rows] == [ROW] * 3
    assert [row["extra"] for row in rows] == extra  # with the nulls that JSON says
    assert counted(rows[0]) == 1


def test_padding_of_arrow_is_no_null_of_the_row(tmp_path):
    """Arrow gives every row what one of them has; JSON says what it says."""
    rows = [{"tools": [{"a": 1}], **ROW}, {"tools": [{"b": None, "c": [None, 2]}], **ROW}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [row["tools"] for row in rows_of(tmp_path / "x.parquet")] == [[{"a": 1}], [{"c": [None, 2]}]]


def test_a_name_with_brackets_is_taken_as_it_is(tmp_path):
    """A file, or a folder, of that very name comes before what the name would match as a pattern."""
    for name in ("q[1].jsonl", "q1.jsonl"):
        (tmp_path / name).write_text('{"prompt": "%s", "chosen": "a", "rejected": "b"}\n' % name)  # noqa: UP031
    assert [row["prompt"] for row in rows_of(tmp_path / "q[1].jsonl")] == ["q[1].jsonl"]
    assert [row["prompt"] for row in rows_of(tmp_path / "q[12].jsonl")] == ["q1.jsonl"]
    with pytest.raises(BadData, match="no file matches"):
        open_rows(str(tmp_path / "q[2].jsonl"), None, None, None)


def test_a_folder_with_brackets_which_the_library_can_not_read_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(BadData, match=r"runs\[1\]: .* takes the brackets .* for a pattern; rename the folder"):
        open_rows(str(folder), None, None, None)
    datasets.Dataset.from_list([ROW]).save_to_disk(folder / "saved")
    assert rows_of(folder / "saved") == [ROW]
