"""The journal: rows come back as they were written, a torn end is dropped, other damage is named, a rewind forgets."""

from __future__ import annotations

import json
import math
import zlib

import pytest

from dpo_lab.runs import metrics_log
from dpo_lab.runs.metrics_log import MetricsLogError, append, position, rows, truncate
from dpo_lab.training.loggers.jsonl import JSONLLogger
from tests.test_architecture import loaded_by


@pytest.fixture
def path(tmp_path):
    path = tmp_path / metrics_log.METRICS_LOG
    append(path, 2, {"train/loss": 0.1 + 0.2, "train/tokens": 12.0})
    append(path, 3, {"val/loss": 0.5})
    return path


def test_rows_come_back_to_the_last_bit_and_bytes_depend_on_them_alone(path, tmp_path):
    assert list(rows(path)) == [
        {"step": 2, "train/loss": 0.1 + 0.2, "train/tokens": 12.0},
        {"step": 3, "val/loss": 0.5},
    ]
    again = tmp_path / "again.jsonl"
    for row in rows(path):
        append(again, row.pop("step"), row)
    assert again.read_bytes() == path.read_bytes()


def test_figures_that_are_not_finite_stay_visible_in_strict_json(tmp_path):
    path = tmp_path / "j"
    append(path, 1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(word: str):
        raise AssertionError(word)

    told = json.loads(path.read_text(), parse_constant=refuse)
    bare = path.read_bytes().partition(b', "crc"')[0]
    assert told.pop("crc") == f"{zlib.crc32(bare):08x}"
    assert told == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (row,) = rows(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "line", [b'{"step": 3, "val/l\n', b"[1, 2]\n", b'{"step": 3, "val/loss": "high"}\n', b"\xff\xfe\n"]
)
def test_damage_before_the_end_names_its_line(path, line):
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + line + whole[1])
    with pytest.raises(MetricsLogError, match=rf"{path}:2: .* type the same command again"):
        list(rows(path))


def test_a_rewind_forgets_what_came_after(path):
    at = position(path, durable=True)
    append(path, 4, {"train/loss": 0.4})
    truncate(path, at)
    assert [row["step"] for row in rows(path)] == [2, 3]
    truncate(path, 0)
    assert list(rows(path)) == []
    assert position(path.with_name("none")) == 0
    truncate(path.with_name("none"), 0)
    with pytest.raises(MetricsLogError, match="0 bytes, but the checkpoint was taken at 7; rows are missing"):
        truncate(path.with_name("none"), 7)


def test_a_logger_of_a_further_rank_writes_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    logger = JSONLLogger(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"a": 1.0}, 1)
    assert not logger.path.exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_hyperparams({"beta": 0.1})
    assert list(rows(logger.path)) == [{"step": 1, "a": 1.0}]


def test_it_is_read_without_torch():
    assert loaded_by("import dpo_lab.runs.metrics_log") & {"torch", "lightning", "transformers"} == set()
