"""Faults 1 to 5 of the matrix: a fit that is killed at any point, a full disk, a damaged checkpoint; and it goes on."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.runs import metrics_log
from dpo_lab.runs.atomic_write import atomic_path
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.checkpoint_io import CheckpointError, VerifiedCheckpointIO, damage, remove_leftovers
from tests.support.kill_points import fork, told
from tests.support.small_fit import IGNORED, STEPS, cut, difference, left, run, saved, step_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]


def is_tried(points: list[str], at: int) -> bool:
    """Every point of a fit but the writes, of which there are hundreds a checkpoint, alike but for their place: some."""
    return points[at] != "write" or at % 100 == 0


def test_01_killed_at_any_point_of_a_fit_it_goes_on_bit_identically(whole, tmp_path):
    points: list[str] = []
    with told(points.append):
        run(tmp_path / "counted")
    assert points.count("step") == STEPS
    assert sum(point.startswith("replace step=") for point in points) == 4
    seen = set()
    for kill_at in (at for at in range(len(points)) if is_tried(points, at)):
        folder, counted = tmp_path / str(kill_at), iter(range(len(points)))

        def tick(what: str, counted=counted, kill_at=kill_at, folder=folder) -> None:
            if next(counted) == kill_at:
                if what == "append":
                    with (folder / metrics_log.METRICS_LOG).open("ab") as file:
                        file.write(b'{"step": 2, "train/lo')
                os.kill(os.getpid(), signal.SIGKILL)

        def killed(tick=tick, folder=folder) -> None:
            folder.mkdir()
            with told(tick):
                run(folder)

        assert fork(killed) == -signal.SIGKILL, points[kill_at]
        committed = [step_of(Path(p.split()[1])) for p in points[:kill_at] if p.startswith("replace step=")]
        there = saved(folder)
        assert there[-2:] == committed[-2:]
        assert all(damage(folder / CHECKPOINTS / f"step={step}.ckpt") is None for step in there)
        journal_now = (
            (folder / metrics_log.METRICS_LOG).read_bytes() if (folder / metrics_log.METRICS_LOG).exists() else b""
        )
        if (state := (*there, journal_now)) not in seen:  # what goes on from the same files goes on the same way
            seen.add(state)
            run(folder)
            assert difference(left(folder), left(whole)) is None, points[kill_at]
            assert not list((folder / CHECKPOINTS).glob(".*"))
    assert len(seen) >= 12


def test_01_killed_at_any_write_of_a_checkpoint_the_old_or_the_new_one_is_whole(tmp_path):
    path, io = tmp_path / "step=1.ckpt", VerifiedCheckpointIO()
    values = {str(i): torch.full((50,), float(i)) for i in range(8)}

    def save(version: int, kill_at: int) -> int:
        counted = iter(range(10_000))

        def tick(what: str) -> None:
            if next(counted) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        with told(tick):
            io.save_checkpoint(values | {"version": version}, path)
        return next(counted)

    points = save(1, -1)
    assert points > 50
    for kill_at in range(points):
        assert fork(lambda kill_at=kill_at: save(2, kill_at)) == -signal.SIGKILL
        is_in_place = kill_at == points - 1  # the last is the folder's fsync
        assert io.load_checkpoint(path)["version"] == (2 if is_in_place else 1)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [path.name]


def test_02_a_checkpoint_is_made_beside_its_place_and_durable_before_it_is_there(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", None)
    points: list[str] = []
    with told(points.append):
        run(tmp_path, steps=2)
    beside = f".step=2.ckpt.{os.getpid()}.tmp"
    last_write = len(points) - 1 - points[::-1].index("write")
    assert points[last_write + 1 :] == [f"fsync {beside}", "replace step=2.ckpt", "fsync checkpoints"]
    before_writes = points[: points.index("write")]
    assert before_writes[-2:] == [
        "fsync metrics.jsonl",
        f"fsync {tmp_path.name}",
    ]  # the rows it counts on; its new folder


def test_03_leftovers_of_a_crash_go_and_nothing_else(whole, tmp_path):
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    others = [".step=2.ckpt.swp", "notes.tmp", ".hidden.tmp", "best.ckpt"]
    for name in (*others, ".step=2.ckpt.4711.tmp", ".epoch=1.ckpt.12.tmp"):
        (folder / name).write_bytes(b"something")
    run(tmp_path)
    assert sorted(os.listdir(folder)) == sorted([*others, "step=6.ckpt", "step=7.ckpt"])
    assert difference(left(tmp_path), left(whole)) is None


def test_03_a_folder_is_there_whole_and_what_was_begun_before_it_is_not(tmp_path):
    """Of a policy that is saved: whole, by a process that dies meanwhile, by one that is interrupted, and again."""
    path = tmp_path / "policy"

    def save(text: str, then: Callable[[], object] = lambda: None) -> None:
        with atomic_path(path) as beside:
            beside.mkdir()
            (beside / text).write_text(text)
            then()

    for name in (".policy.swp", ".policy.4711.tmp", ".other.4711"):
        (tmp_path / name).touch()
    others = sorted([*os.listdir(tmp_path), "policy"])
    save("first")
    assert fork(lambda: save("second", lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == len(others) + 1
    with pytest.raises(KeyboardInterrupt):
        save("third", lambda: signal.default_int_handler(signal.SIGINT, None))
    assert sorted(os.listdir(tmp_path)) == others
    assert os.listdir(path) == ["first"]
    points: list[str] = []
    with told(points.append):
        save("fourth")
    assert points == [f"fsync .policy.{os.getpid()}", "fsync fourth", "replace policy", f"fsync {tmp_path.name}"]
    assert os.listdir(path) == ["fourth"]


@pytest.mark.parametrize("limit", [0, 1, 4000, 30_000])
def test_04_a_full_disk_fails_loudly_and_leaves_the_old_checkpoint(limit, whole, tmp_path):
    """Files may grow to so many bytes and no further, which a write is told as it is told that the disk is full."""
    cut(tmp_path, 4)
    old = {path.name: path.read_bytes() for path in (tmp_path / CHECKPOINTS).iterdir()}
    assert all(len(content) > 30_000 for content in old.values())

    def starved() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = VerifiedCheckpointIO.save_checkpoint

        def save_starved(*args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                save(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        with patch.object(VerifiedCheckpointIO, "save_checkpoint", save_starved):
            try:
                run(tmp_path)
            except CheckpointError as error:
                (tmp_path / "said").write_text(str(error))
                raise

    assert fork(starved) == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith(
        f"{tmp_path / CHECKPOINTS / 'step=6.ckpt'}: could not be written (File too large); earlier checkpoints"
    )
    assert "\n" not in said
    assert {path.name: path.read_bytes() for path in (tmp_path / CHECKPOINTS).iterdir()} == old
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


def test_05_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    path = tmp_path / "step=1.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"weights": torch.arange(4.0), "step": 1}, path)
    whole = path.read_bytes()
    assert damage(path) is None
    for at in {*range(0, len(whole), len(whole) // 150), *range(len(whole) - 80, len(whole))}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert damage(path) is not None, at
        path.write_bytes(whole[:at])
        assert damage(path) is not None, at
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"step=1.ckpt: damaged, its checksum does not match; delete it"):
        VerifiedCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty"])
def test_05_a_damaged_last_checkpoint_falls_back_loudly_and_none_is_refused(fault, whole, tmp_path, caplog):
    def damaged(content: bytes) -> bytes:
        middle = len(content) // 2
        return {"truncated": content[:middle], "flipped": content[:middle] + b"\xff\x00" + content[middle + 2 :]}.get(
            fault, b""
        )

    cut(tmp_path, 4)
    first, last = (tmp_path / CHECKPOINTS / f"step={step}.ckpt" for step in (2, 4))
    contents = first.read_bytes()
    for path in (first, last):
        path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in it is intact \(step=2.ckpt, step=4.ckpt\).*type rm -r"
    ):
        run(tmp_path)
    first.write_bytes(contents)
    caplog.clear()
    run(tmp_path)
    assert f"{last}: damaged, its checksum does not match; skipped, using the one before" in caplog.text
    assert difference(left(tmp_path), left(whole)) is None
    assert saved(tmp_path) == [6, 7]


def test_01_loader_workers_die_with_a_fit_that_is_killed(tmp_path):
    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            workers = [str(w.pid) for w in trainer.train_dataloader._iterator._workers]
            (tmp_path / "workers").write_text(" ".join(workers))
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(lambda: run(tmp_path, workers=2, callbacks=[Kill()])) == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 3  # torch's own workers look for their parent every 5 s
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
