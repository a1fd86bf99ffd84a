"""Faults 6, 8, 10, 13, 16, 17 and 36 of the matrix: a fit that is asked to stop, fed NaN or changed, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lab.distributed.signals import StopSignal, raise_on_signals
from dpo_lab.runs import metrics_log
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.checkpoint_io import CheckpointError, VerifiedCheckpointIO, damage, newest
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.nonfinite import NotFinite
from dpo_lab.training.optim import Optim
from tests.conftest import REPOSITORY
from tests.support.kill_points import told
from tests.support.small_fit import IGNORED, PAIRS, STEPS, Leave, LeaveAt, cut, difference, left, run, saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]


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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_06_asked_to_stop_when_all_is_done_it_ends_silently(signum):
    late = f"import atexit, os; atexit.register(os.kill, os.getpid(), {int(signum)})"
    script = f"import sys; from dpo_lab.cli import entry_point; {late}; sys.exit(entry_point.run_command(lambda: None))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signum, "", "")


CUT_SHORT = """
import errno, os, signal, sys
from omegaconf import OmegaConf, open_dict
from dpo_lab.cli import entry_point
from dpo_lab.config import schema
from dpo_lab.sweeps import sweeper
def in_a_library():
    cfg = OmegaConf.create({"run": {}})
    with open_dict(cfg):
        assert cfg.get("name") is None
        cfg.__dict__["_content"]["run"] = None  # as it is for a moment while a key is set; open_dict stumbles over it
        os.kill(os.getpid(), signal.SIGTERM)
def in_safety():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise OSError(errno.ENOSPC, "No space left on device", "run.json")
schema.validate = lambda cfg: cfg
schema.check_files = lambda settings: None
work, when = globals()[sys.argv[1]], sys.argv[2]
del sys.argv[1:]
if when == "finding plugins":
    sweeper.register = lambda as_record: work()
in_a_run = lambda: entry_point.validate_and_run(OmegaConf.create(), lambda _: work())
sys.exit(entry_point.run_command(work if when == "composing" else in_a_run))
"""


@pytest.mark.parametrize("when", ["finding plugins", "composing", "running"])
@pytest.mark.parametrize(
    ("where", "code", "said"), [("in_a_library", 143, ""), ("in_safety", 1, "No space left on device")]
)
def test_06_what_stumbles_because_it_was_cut_short_is_no_error_but_a_full_disk_is(where, code, said, when):
    command = [sys.executable, "-c", CUT_SHORT, where, when]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == bool(said), ended.stderr


@pytest.fixture
def as_a_run_hears_signals() -> None:
    raise_on_signals()


@pytest.mark.usefixtures("as_a_run_hears_signals")
@pytest.mark.parametrize(
    ("at", "signum", "status", "code"),
    [
        *((at, signal.SIGTERM, "preempted", 143) for at in range(STEPS)),
        (0, signal.SIGINT, "interrupted", 130),
        (3, signal.SIGINT, "interrupted", 130),
        *(pytest.param(at, signal.SIGINT, "interrupted", 130, marks=pytest.mark.extended) for at in (1, 2, 4, 5, 6)),
    ],
)
def test_06_asked_to_stop_it_finishes_the_step_saves_and_goes_on_bit_identically(
    at, signum, status, code, whole, tmp_path
):
    before = signal.getsignal(signum)
    with pytest.raises(StopSignal) as stopped:
        run(tmp_path, callbacks=[Signal(at, signum)])
    assert (stopped.value.status, stopped.value.exit_code) == (status, code)
    assert saved(tmp_path)[-1] == at + 1
    once = signal.SIG_IGN if signum == signal.SIGTERM else before  # what is still to be written is not cut short
    assert signal.getsignal(signum) is once
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.usefixtures("as_a_run_hears_signals")
@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("times", [1, 2])
def test_06_asked_to_stop_in_a_validation_it_owes_it(at, times, whole, tmp_path):
    """The second time it is asked in the validation that it owes from the first."""
    for _ in range(times):
        with pytest.raises(StopSignal):
            run(tmp_path, callbacks=[Signal(at, signal.SIGTERM, validating=True)])
        assert saved(tmp_path)[-1] == at
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.usefixtures("as_a_run_hears_signals")
def test_06_a_fit_that_saves_nothing_stops_all_the_same(tmp_path):
    rows = tmp_path / metrics_log.METRICS_LOG
    for callback, steps in ((Signal(2, signal.SIGTERM), [2]), (Signal(3, signal.SIGINT, validating=True), [2])):
        rows.unlink(missing_ok=True)
        with pytest.raises(StopSignal):
            run(tmp_path, every_n_steps=0, callbacks=[callback])
        assert [row["step"] for row in metrics_log.rows(rows)] == steps
        assert saved(tmp_path) == []


@pytest.mark.usefixtures("as_a_run_hears_signals")
def test_06_a_stop_that_comes_when_all_is_trained_is_not_lost(whole, tmp_path):
    class InTheEnd(Callback):
        def on_fit_end(self, trainer, module) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopSignal):
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
        with told(tick), pytest.raises(StopSignal):
            run(folder, callbacks=[Signal(2, second)])
        expected = [2, 3] if second == signal.SIGTERM or number >= points.count("write") else [2]
        assert saved(folder) == expected
        assert all(damage(folder / CHECKPOINTS / f"step={step}.ckpt") is None for step in expected)
        assert not list((folder / CHECKPOINTS).glob(".*"))
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
    last = tmp_path / CHECKPOINTS / f"step={len(updates) // 2 * 2}.ckpt"
    said = str(error.value)
    assert said.startswith(
        f"step {step}: the loss or its gradient is not finite (pair {Poisoned.bad}). The step was not applied"
    )
    assert f"the last checkpoint before it is {last}." in said
    assert "optim.lr" in said
    assert "\n" not in said
    assert newest(tmp_path / CHECKPOINTS) == last
    assert all(torch.isfinite(value).all() for value in left(tmp_path)["state_dict"].values())


def test_10_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    next(module.model.parameters()).view(-1)[0] = float("inf")

    with pytest.raises(NotFinite, match="step 4: a weight or its optimizer state is not finite"):
        run(tmp_path, callbacks=[Break()])
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_13_another_number_of_loader_workers_changes_nothing(before, after, whole, tmp_path):
    cut(tmp_path, 5, workers=before)
    run(tmp_path, workers=after)
    assert difference(left(tmp_path), left(whole)) is None


def test_16_each_step_stands_once_in_the_journal_and_in_tensorboard(whole, tmp_path):
    def loggers(step: int):
        return [TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False, purge_step=step)]

    for at in (LeaveAt(1), LeaveAt(3), LeaveAt(5), LeaveAt(6, validating=True)):
        with pytest.raises(Leave):
            run(tmp_path, loggers=loggers, callbacks=[at])
    run(tmp_path, loggers=loggers)
    assert (tmp_path / metrics_log.METRICS_LOG).read_bytes() == (whole / metrics_log.METRICS_LOG).read_bytes()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    rows = list(metrics_log.rows(tmp_path / metrics_log.METRICS_LOG))
    for name in ("train/loss", "val/loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


@pytest.mark.parametrize("missing", ["random", "all"])
def test_17_a_checkpoint_without_the_state_of_the_generators_is_refused(missing, tmp_path):
    run(tmp_path, steps=2)
    path = newest(tmp_path / CHECKPOINTS)
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
    path = tmp_path / metrics_log.METRICS_LOG
    content = (whole / metrics_log.METRICS_LOG).read_bytes()
    rows = list(metrics_log.rows(whole / metrics_log.METRICS_LOG))
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(content), 7):
        path.write_bytes(content[:end])
        assert list(metrics_log.rows(path)) == rows[:-1]
    cut(tmp_path / "run", 5)
    with (tmp_path / "run" / metrics_log.METRICS_LOG).open("ab") as file:
        file.write(content[last : last + 30])
    run(tmp_path / "run")
    assert (tmp_path / "run" / metrics_log.METRICS_LOG).read_bytes() == content
