"""Faults 5, 30 and 36 of the matrix, byte by byte: whatever single byte of a checkpoint, cache or journal changed is found."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_lab.models.policy import Policy
from dpo_lab.models.reference import Cached
from dpo_lab.runs import cache, metrics_log
from dpo_lab.runs.metrics_log import MetricsLogError
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.checkpoint_io import damage, newest
from tests.conftest import make_pairs
from tests.data.test_tokenized_cache import row, store_of, written
from tests.support.small_fit import IGNORED

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]

TRIES = (
    int(os.environ.get("CORRUPTIONS", 300)) // 6
)  # of each of six kinds of file; type CORRUPTIONS=2000 before the command


def corrupted(path: Path, seed: str, tries: int = TRIES) -> Iterator[int]:
    """So many times: the file with one byte changed to another, at a place drawn; then whole again."""
    whole, drawn = path.read_bytes(), random.Random(seed)
    for _ in range(tries):
        at = drawn.randrange(len(whole))
        changed = bytearray(whole)
        changed[at] ^= drawn.randrange(1, 256)
        path.write_bytes(changed)
        yield at
    path.write_bytes(whole)


def test_05_no_changed_byte_of_a_checkpoint_stays_unseen(whole, tmp_path):
    source = newest(whole / CHECKPOINTS)
    assert source is not None
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    assert damage(path) is None
    for at in corrupted(path, "checkpoint"):
        assert damage(path) is not None, at
    assert damage(path) is None


def reference(folder: Path, policy: Policy) -> Path:
    return Cached().prepare(policy.model, make_pairs(12), folder).path


def initial_policy(folder: Path, policy: Policy) -> Path:
    return cache.cached(folder / "policy-1", policy.save)


def pairs(folder: Path, policy: Policy) -> Path:
    store_of(folder, written(folder / "rows.jsonl", *map(row, range(20))))
    return next(found for found in folder.glob("pairs-*") if found.is_dir())


def responses(folder: Path, policy: Policy) -> Path:
    return cache.cached(folder / "responses-1.json", lambda path: path.write_text(json.dumps(["a", None, "b"])))


@pytest.mark.parametrize("made", [reference, initial_policy, pairs, responses])
def test_30_no_changed_byte_of_a_cache_or_of_its_seal_stays_unseen(made, policy, tmp_path):
    path = made(tmp_path, policy)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    files.append(path.with_name(f".{path.name}.seal"))
    for file in files:
        for at in corrupted(file, file.name, -(-TRIES // len(files))):
            assert not cache.is_intact(path), f"{file}: byte {at}"
    assert cache.is_intact(path)


def test_36_no_changed_byte_of_a_journal_stays_unseen(tmp_path):
    """Nor does one pass for a torn last line, which is dropped: a row that is missing only its end of line is damaged."""
    path = tmp_path / metrics_log.METRICS_LOG
    for step in range(6):
        metrics_log.append(path, step, {"train/loss": 0.1 + step, "train/rewards/margins": -1e-9 * step})
    rows = list(metrics_log.rows(path))
    for at in corrupted(path, "journal"):
        with pytest.raises(MetricsLogError):
            raise AssertionError(f"byte {at} changed unseen: {list(metrics_log.rows(path))}")
    assert list(metrics_log.rows(path)) == rows
