"""What must happen to a run's folder when something about the run changed, or nothing did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_lab.runs import run_record
from dpo_lab.runs.fingerprint import changed_files, fingerprint

pytestmark = pytest.mark.slow

CONFIG = {
    "beta": 0.1,
    "data": {"path": "pairs.jsonl", "unpair": False},
    "trainer": {"max_steps": 160},
    "if_exists": "error",
}


def left(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def begin(folder: Path, config: dict, files: tuple[Path, ...] = (), ends: bool = True) -> None:
    """A run that reached a checkpoint, and its end, or did not."""
    with run_record.acquire_run(folder, config, [], files) as run:
        assert run is not None
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "step=80.ckpt").write_bytes(b"weights")
        if not ends:
            raise InterruptedError


@pytest.mark.parametrize("ends", [True, False])
def test_11_a_changed_config_is_refused_with_the_difference(ends, tmp_path):
    try:
        begin(tmp_path, CONFIG, ends=ends)
    except InterruptedError:
        assert not ends
    before = left(tmp_path)
    with (
        pytest.raises(run_record.RunRefused, match=r"beta: was 0.1, now 0.5.*name=another.*if_exists=restart"),
        run_record.acquire_run(tmp_path, CONFIG | {"beta": 0.5}, []),
    ):
        pytest.fail("entered")
    assert left(tmp_path) == before


def test_11_on_request_the_other_run_is_set_aside_whole(tmp_path):
    begin(tmp_path, CONFIG)
    (tmp_path / "run.log").write_text("a log\n")
    before = {path.relative_to(tmp_path): content for path, content in left(tmp_path).items()}
    begin(tmp_path, CONFIG | {"beta": 0.5, "if_exists": "restart"})
    aside = {
        path.relative_to(tmp_path / "earlier-1"): content for path, content in left(tmp_path / "earlier-1").items()
    }
    assert aside == {path: content for path, content in before.items() if path.name != "run.log"}
    record = run_record.read_record(tmp_path)
    assert record is not None
    assert record["config"]["beta"] == 0.5


def test_11_more_steps_may_come(tmp_path):
    begin(tmp_path, CONFIG)
    assert run_record.run_status(tmp_path, CONFIG | {"trainer": {"max_steps": 161}}) is run_record.RunStatus.unfinished


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("change", ["other content", "other size", "gone", "one more"])
def test_12_changed_files_are_refused(change, ends, tmp_path):
    data = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in data:
        file.write_text("{}")
    folder = tmp_path / "run"
    try:
        begin(folder, CONFIG, tuple(data), ends)
    except InterruptedError:
        assert not ends
    before = left(folder)
    if change == "gone":
        data.pop()
    elif change == "one more":
        data.append(tmp_path / "c.jsonl")
        data[-1].write_text("{}")
    else:
        data[1].write_text("[]" if change == "other content" else "[1]")
        os.utime(data[1], ns=(1, 1))
    with (
        pytest.raises(run_record.RunRefused, match=r"[bc].jsonl .*if_exists=restart"),
        run_record.acquire_run(folder, CONFIG, [], data),
    ):
        pytest.fail("entered")
    assert left(folder) == before


def test_12_a_file_that_was_only_touched_is_the_same(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    known = fingerprint([file])
    os.utime(file, ns=(1, 1))
    assert changed_files(known, [file]) == []


def test_15_a_finished_run_is_not_touched(tmp_path):
    begin(tmp_path, CONFIG)
    before = left(tmp_path)
    with run_record.acquire_run(tmp_path, CONFIG, []) as run:
        assert run is None
    assert left(tmp_path) == before
