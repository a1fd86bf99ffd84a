"""Rows of every kind of file, plain and compressed, of several files and of data sets; what can't be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from dpo_lab.data.rows import BadData, open_rows, parse

ROWS = [{"prompt": f"p{i}", "chosen": f"good, {i}\nor not", "rejected": 'b"ad é'} for i in range(5)]
CHATS = [{"prompt": [{"role": "user", "content": f"p{i}"}], "chosen": "a", "rejected": "b"} for i in range(5)]


def opened(path, name=None, split=None):
    return open_rows(str(path) if isinstance(path, Path) else path, name, split, None)


def all_of(path, **settings) -> list[tuple[str, dict]]:
    """(place:number, row) of everything."""
    found = opened(path, **settings)
    chunks = list(found.chunks())
    assert sum(chunk.amount for chunk in chunks) == found.total
    return [
        (f"{Path(chunk.place).name}:{number}", dict(parse(row)))
        for chunk in chunks
        for number, row in zip(chunk.numbers, chunk.rows, strict=True)
    ]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the manner of the path's suffix."""
    match path.suffix:
        case ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        case ".feather":
            pa.feather.write_feather(pa.Table.from_pylist(rows), path, chunksize=2)
        case ".arrow":  # a stream, as `datasets` writes it
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case ".csv" | ".tsv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".gz":
            path.write_bytes(gzip.compress(lines(rows)))
        case ".bz2":
            path.write_bytes(bz2.compress(lines(rows)))
        case ".xz":
            path.write_bytes(lzma.compress(lines(rows)))
        case ".zst":
            path.write_bytes(pa.compress(lines(rows), "zstd", asbytes=True))
        case _:
            path.write_bytes(lines(rows))
    return path


NUMBERED = ["x.jsonl", "x.ndjson", "x", "x.json", "x.parquet", "x.feather", "x.arrow"]
COMPRESSED = ["x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst"]


@pytest.mark.parametrize("name", NUMBERED + COMPRESSED)
@pytest.mark.parametrize("rows", [ROWS, CHATS])
def test_every_kind_of_file(name, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_lab.data.readers.CHUNK", 3)  # the rows lie in two chunks
    path = write(tmp_path / name, rows)
    assert all_of(path) == [(f"{name}:{i}", row) for i, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_row_of_csv_has_the_line_that_it_begins_on(name, tmp_path):
    path = write(tmp_path / name, ROWS)
    assert all_of(path) == [(f"{name}:{2 + 2 * i}", row) for i, row in enumerate(ROWS)]


def test_csv_under_gzip_and_json_that_is_lines(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "y.csv", ROWS).read_bytes()))
    assert [row for _, row in all_of(path)] == ROWS
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + lines(ROWS))
    assert [row for _, row in all_of(tmp_path / "x.json")] == ROWS


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\n  \n" + lines(ROWS[1:2]))
    assert all_of(path) == [("x.jsonl:1", ROWS[0]), ("x.jsonl:4", ROWS[1])]


def test_several_files_and_patterns_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        write(tmp_path / name, ROWS[:2])
    places = [place for place, _ in all_of([str(tmp_path / "c.parquet"), str(tmp_path / "*.jsonl")])]
    assert places == ["c.parquet:1", "c.parquet:2", "a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]


def test_a_digest_is_of_content_not_of_names(tmp_path):
    first, same = (write(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl"))
    other = write(tmp_path / "c.jsonl", ROWS[1:])
    assert opened(first).digest() == opened(same).digest() != opened(other).digest()


UNREADABLE = [
    ("x.parquet", b"PAR1 nothing of the kind"),
    ("x.arrow", b"ARROW1 no"),
    ("x.jsonl.gz", b"not gzip at all"),
    ("x.jsonl.gz", gzip.compress(lines(ROWS) * 1000)[:-40]),
    ("x.jsonl.zst", pa.compress(lines(ROWS) * 1000, "zstd", asbytes=True)[:-40]),
    ("x.jsonl.xz", lzma.compress(lines(ROWS))[:-9]),
    ("x.json", b'[{"prompt": "a"}, '),
    ("x.json", b'[{"prompt": "\xff"}]'),
]


@pytest.mark.parametrize(("name", "content"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_damaged_file_is_named_in_one_line(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadData) as error:
        list(opened(path).chunks())
    assert str(error.value).startswith(f"{path}: can't be read after ")
    assert "fix the file or download it again" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere.jsonl", "no such file; type the path of a file"),
        ("./nowhere", "no such file"),
        ("a/b/c", "no such file"),
        ("*.jsonl", "no file matches"),
        (["nowhere.jsonl"], "no such file"),
    ],
)
def test_a_missing_file_names_the_key(path, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match=f"data.path=.*{what}"):
        open_rows(path, None, None, None)


@pytest.fixture
def quiet_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_a_folder_of_files_with_splits(quiet_datasets, tmp_path, monkeypatch):
    """What `datasets` takes from the hub is taken from a folder of the same form, also by one who stands in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:2])
    assert [row for _, row in all_of(folder)] == ROWS  # the train split, unless another is asked for
    found = all_of(folder, split="test")
    assert found == [(f"test.jsonl:{i}", row) for i, row in enumerate(ROWS[:2], start=1)]
    with pytest.raises(BadData, match=r"data.split=dev: .* no such split; type data.split= one of .*train"):
        opened(folder, split="dev")
    monkeypatch.chdir(folder)
    assert all_of(".", split="test") == found


def test_a_folder_that_says_what_its_files_are(quiet_datasets, tmp_path):
    """Configurations by its card; one of the files is kept elsewhere."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "first.csv").symlink_to(write(tmp_path / "kept.csv", ROWS))
    write(folder / "second.jsonl", ROWS[:2])
    write(folder / "third.parquet", ROWS[2:])
    (folder / "lines.json").write_bytes(lines(ROWS))  # nothing is wrong with it
    configs = [("a", "first.csv"), ("b", ["second.jsonl", "second.jsonl"]), ("c", "third.parquet")]
    entries = [{"config_name": each, "data_files": files} for each, files in configs]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")
    assert all_of(folder, name="a") == [(f"first.csv:{2 + 2 * i}", row) for i, row in enumerate(ROWS)]
    assert {place for place, _ in all_of(folder, name="b")} == {"second.jsonl:1", "second.jsonl:2"}
    assert [row for _, row in all_of(folder, name="c")] == ROWS[2:]
    with pytest.raises(BadData, match=f"{folder}: can't be read .*'d'"):
        opened(folder, name="d")


def test_a_folder_of_what_the_library_alone_reads(quiet_datasets, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("one\ntwo\n")
    assert all_of(tmp_path / "mine") == [("mine:1", {"text": "one"}), ("mine:2", {"text": "two"})]


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("train/state.json", lambda content: content[:60], r"state.json: can't be read \(Unterminated"),
        ("train/dataset_info.json", lambda content: b"\xff" + content, "dataset_info.json: can't be read .*utf-8"),
        ("train/state.json", lambda content: b"{}", r"dict: can't be read \('_data_files'\)"),
        ("train/data-00000-of-00001.arrow", lambda content: content[:300], "data-00000-of-00001.arrow: can't be read"),
        ("train/data-00000-of-00001.arrow", lambda content: content.replace(b"good", b"\xffood"), "001.arrow: .*UTF8"),
    ],
)
def test_a_damaged_file_of_what_datasets_saved_is_named(name, damage, what, quiet_datasets, tmp_path):
    saved = quiet_datasets.DatasetDict({"train": quiet_datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "dict")
    file = tmp_path / "dict" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BadData, match=what) as error:
        list(opened(tmp_path / "dict").chunks())
    assert str(error.value).endswith("; fix the file or download it again")


def test_what_datasets_saved(quiet_datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_lab.data.rows.CHUNK", 3)
    quiet_datasets.Dataset.from_list(CHATS).save_to_disk(tmp_path / "one")
    saved = quiet_datasets.DatasetDict({"train": quiet_datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "dict")
    assert [row for _, row in all_of(tmp_path / "one")] == CHATS
    assert all_of(tmp_path / "dict") == [(f"dict:{i}", row) for i, row in enumerate(ROWS, start=1)]
    assert opened(tmp_path / "one").digest() != opened(tmp_path / "dict").digest()


def test_a_name_that_is_not_on_the_hub_ends_in_one_line(quiet_datasets, monkeypatch):
    monkeypatch.setattr(quiet_datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BadData, match=r"data.path=nobody/nothing: .*; type the path of a file, or a data set's name"
    ) as e:
        opened("nobody/nothing")
    assert "\n" not in str(e.value)
