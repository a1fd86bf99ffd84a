"""Faults 1 to 8, 10, 13, 16, 17 and 36 of the matrix: a fit that is killed, stopped or fed NaN, and goes on.

Points to be killed at are counted, not timed: each trial is a fork of this process, which has loaded torch already.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lab.results import journal
from dpo_lab.stop import Stopped, raise_on_signals
from dpo_lab.training import checkpoint
from dpo_lab.training.checkpoint import FOLDER, CheckpointError, VerifiedCheckpointIO, damage, newest, remove_leftovers
from dpo_lab.training.finite import NotFinite
from dpo_lab.training.module import DPOModule
from dpo_lab.training.optim import Optim
from tests.small_fit import IGNORED, PAIRS, STEPS, Leave, LeaveAt, cut, difference, left, run, saved, step_of

pytestmark = pytest.mark.filterwarnings(*IGNORED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a fit that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def fork(action: Callable[[], object]) -> int:
    """Do it in a fork of this process; its exit code, that of an exception is 1, less a signal's number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def told(tick: Callable[[str], None]) -> Iterator[None]:
    """Call tick(what) before every write, fsync, replace and removal of a checkpoint, optimizer step and row of the journal."""

    def before(owner: object, name: str, what: Callable[..., str]):
        real = getattr(owner, name)

        def instead(*args, **kwargs):
            tick(what(*args))
            return real(*args, **kwargs)

        return patch.object(owner, name, instead)

    with ExitStack() as stack:
        for patched in (
            before(checkpoint._HashingWriter, "write", lambda *_: "write"),
            before(os, "fsync", lambda handle: f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}"),
            before(os, "replace", lambda source, target: f"replace {target.name}"),
            before(VerifiedCheckpointIO, "remove_checkpoint", lambda io, path: f"remove {path.name}"),
            before(torch.optim.AdamW, "step", lambda *_: "step"),
            before(journal, "append", lambda *_: "append"),
        ):
            stack.enter_context(patched)
        yield


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
                    with (folder / journal.JOURNAL).open("ab") as file:
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
        assert all(damage(folder / FOLDER / f"step={step}.ckpt") is None for step in there)
        journal_now = (folder / journal.JOURNAL).read_bytes() if (folder / journal.JOURNAL).exists() else b""
        if (state := (*there, journal_now)) not in seen:  # what goes on from the same files goes on the same way
            seen.add(state)
            run(folder)
            assert difference(left(folder), left(whole)) is None, points[kill_at]
            assert not list((folder / FOLDER).glob(".*"))
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
    assert before_writes[-2:] == ["fsync metrics.jsonl", f"fsync {tmp_path.name}"]  # the rows it counts on; its new folder


def test_03_leftovers_of_a_crash_go_and_nothing_else(whole, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    others = [".step=2.ckpt.swp", "notes.tmp", ".hidden.tmp", "best.ckpt"]
    for name in (*others, ".step=2.ckpt.4711.tmp", ".epoch=1.ckpt.12.tmp"):
        (folder / name).write_bytes(b"something")
    run(tmp_path)
    assert sorted(os.listdir(folder)) == sorted([*others, "step=6.ckpt", "step=7.ckpt"])
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.parametrize("limit", [0, 1, 4000, 30_000])
def test_04_a_full_disk_fails_loudly_and_leaves_the_old_checkpoint(limit, whole, tmp_path):
    """Files may grow to so many bytes and no further, which a write is told as it is told that the disk is full."""
    cut(tmp_path, 4)
    old = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
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
    assert said.startswith(f"{tmp_path / FOLDER / 'step=6.ckpt'}: could not be written (File too large); checkpoints before")
    assert "\n" not in said
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == old
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
    with pytest.raises(CheckpointError, match=r"step=1.ckpt: damaged, its checksum does not hold; delete it"):
        VerifiedCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty"])
def test_05_a_damaged_last_checkpoint_falls_back_loudly_and_none_is_refused(fault, whole, tmp_path, caplog):
    def damaged(content: bytes) -> bytes:
        middle = len(content) // 2
        return {"truncated": content[:middle], "flipped": content[:middle] + b"\xff\x00" + content[middle + 2 :]}.get(fault, b"")

    cut(tmp_path, 4)
    first, last = (tmp_path / FOLDER / f"step={step}.ckpt" for step in (2, 4))
    contents = first.read_bytes()
    for path in (first, last):
        path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"no checkpoint in it is whole \(step=2.ckpt, step=4.ckpt\).*type rm -r"):
        run(tmp_path)
    first.write_bytes(contents)
    caplog.clear()
    run(tmp_path)
    assert f"{last}: damaged, its checksum does not hold; passed over for the one before" in caplog.text
    assert difference(left(tmp_path), left(whole)) is None
    assert saved(tmp_path) == [6, 7]


class Signal(Callback):
    """Send this process signals in the step after step N, or in the validation after it."""

    def __init__(self, step: int, *signums: int, validating: bool = False) -> None:
        self.step, self.signums, self.validating = step, signums, validating

    def on_train_batch_start(self, trainer, *args) -> None:
        self._send(trainer, False)

    def on_validation_batch_start(self, trainer, *args) -> None:
        self._send(trainer, True)

    def _send(self, trainer, validating: bool) -> None:
        if trainer.global_step == self.step and validating is self.validating:
            for signum in self.signums:
                os.kill(os.getpid(), signum)


@pytest.fixture
def as_a_run_hears_signals() -> Iterator[None]:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    raise_on_signals()
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("as_a_run_hears_signals")
@pytest.mark.parametrize("signum, status, code", [(signal.SIGTERM, "preempted", 143), (signal.SIGINT, "interrupted", 130)])
@pytest.mark.parametrize("at", range(STEPS))
def test_06_asked_to_stop_it_finishes_the_step_saves_and_goes_on_bit_identically(at, signum, status, code, whole, tmp_path):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, callbacks=[Signal(at, signum)])
    assert (stopped.value.status, stopped.value.exit_code) == (status, code)
    assert saved(tmp_path)[-1] == at + 1
    assert signal.getsignal(signum) is before
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.usefixtures("as_a_run_hears_signals")
@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("times", [1, 2])
def test_06_asked_to_stop_in_a_validation_it_owes_it(at, times, whole, tmp_path):
    """The second time it is asked in the validation that it owes from the first."""
    for _ in range(times):
        with pytest.raises(Stopped):
            run(tmp_path, callbacks=[Signal(at, signal.SIGTERM, validating=True)])
        assert saved(tmp_path)[-1] == at
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.usefixtures("as_a_run_hears_signals")
def test_06_a_stop_that_comes_when_all_is_trained_is_not_lost(whole, tmp_path):
    class InTheEnd(Callback):
        def on_fit_end(self, trainer, module) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tmp_path, callbacks=[InTheEnd()])
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.usefixtures("as_a_run_hears_signals")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_08_a_second_signal_during_the_save_leaves_the_old_or_the_new_checkpoint(second, whole, tmp_path):
    """SIGTERM again is heard and changes nothing; SIGINT again, at the keyboard, is obeyed in the middle of the save."""
    points: list[str] = []
    for number in range(0, 300, 60):

        def tick(what: str, number=number) -> None:
            points.append(what)
            if points.count("write") == number + 1:
                os.kill(os.getpid(), second)

        points.clear()
        folder = tmp_path / str(number)
        cut(folder, 2)
        with told(tick), pytest.raises(Stopped):
            run(folder, callbacks=[Signal(2, second)])
        expected = [2, 3] if second == signal.SIGTERM or number >= points.count("write") else [2]
        assert saved(folder) == expected
        assert all(damage(folder / FOLDER / f"step={step}.ckpt") is None for step in expected)
        assert not list((folder / FOLDER).glob(".*"))
        run(folder)
        assert difference(left(folder), left(whole)) is None


class Poisoned(DPOModule):
    """Step 4 goes wrong by one pair."""

    bad = PAIRS.key(5)

    def part_loss(self, part):
        loss = super().part_loss(part)
        if self.global_step >= 3 and self.bad in part.keys:
            loss = self.poison(loss)
        return loss


class NanLoss(Poisoned):
    def poison(self, loss):
        return loss * float("nan")


class InfiniteGradient(Poisoned):
    def poison(self, loss):
        return loss + torch.sqrt(0 * loss)  # 0, with an infinite slope


@pytest.mark.parametrize("kind", [NanLoss, InfiniteGradient])
@pytest.mark.parametrize("limit", [1.0, None])
def test_10_a_loss_or_gradient_that_is_not_finite_ends_the_fit_before_the_step(kind, limit, tmp_path):
    updates: list[str] = []
    with (
        told(lambda what: updates.append(what) if what == "step" else None),
        pytest.raises(NotFinite) as error,
    ):
        run(tmp_path, kind=kind, optim=Optim(lr=1e-2, max_grad_norm=limit), steps=12)
    step = len(updates) + 1
    last = tmp_path / FOLDER / f"step={len(updates) // 2 * 2}.ckpt"
    said = str(error.value)
    assert said.startswith(f"step {step}: the loss or its gradient is not finite (pair {Poisoned.bad}). It was not trained")
    assert f"the last checkpoint, from before it, is {last}." in said
    assert "optim.lr" in said
    assert "\n" not in said
    assert newest(tmp_path / FOLDER) == last
    assert all(torch.isfinite(value).all() for value in left(tmp_path)["state_dict"].values())


def test_10_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    next(module.model.parameters()).view(-1)[0] = float("inf")

    with pytest.raises(NotFinite, match="step 4: a weight or the optimizer's memory of it is not finite"):
        run(tmp_path, callbacks=[Break()])
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize("before, after", [(0, 2), (2, 0)])
def test_13_another_number_of_loader_workers_changes_nothing(before, after, whole, tmp_path):
    cut(tmp_path, 5, workers=before)
    run(tmp_path, workers=after)
    assert difference(left(tmp_path), left(whole)) is None


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


def test_16_each_step_stands_once_in_the_journal_and_in_tensorboard(whole, tmp_path):
    def loggers(step: int):
        return [TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False, purge_step=step)]

    for at in (LeaveAt(1), LeaveAt(3), LeaveAt(5), LeaveAt(6, validating=True)):
        with pytest.raises(Leave):
            run(tmp_path, loggers=loggers, callbacks=[at])
    run(tmp_path, loggers=loggers)
    assert (tmp_path / journal.JOURNAL).read_bytes() == (whole / journal.JOURNAL).read_bytes()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    rows = list(journal.rows(tmp_path / journal.JOURNAL))
    for name in ("train/loss", "val/loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


@pytest.mark.parametrize("missing", ["random", "all"])
def test_17_a_checkpoint_without_the_state_of_the_generators_is_refused(missing, tmp_path):
    run(tmp_path, steps=2)
    path = newest(tmp_path / FOLDER)
    assert path is not None
    found = torch.load(path, weights_only=True)
    if missing == "all":
        del found["dpo_lab"]
    else:
        del found["dpo_lab"]["ranks"][0]["random"]
    VerifiedCheckpointIO().save_checkpoint(found, path)
    with pytest.raises(CheckpointError, match=r"step=2.ckpt: holds no state of the random generators.*delete it"):
        run(tmp_path)


def test_36_a_torn_last_line_of_the_journal_is_dropped_and_nothing_else(whole, tmp_path):
    path = tmp_path / journal.JOURNAL
    content = (whole / journal.JOURNAL).read_bytes()
    rows = list(journal.rows(whole / journal.JOURNAL))
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(content), 7):
        path.write_bytes(content[:end])
        assert list(journal.rows(path)) == rows[:-1]
    cut(tmp_path / "run", 5)
    with (tmp_path / "run" / journal.JOURNAL).open("ab") as file:
        file.write(content[last : last + 30])
    run(tmp_path / "run")
    assert (tmp_path / "run" / journal.JOURNAL).read_bytes() == content
