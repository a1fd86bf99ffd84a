"""Trainings that are killed and asked to stop at moments drawn, starved of disk, locked out, and told a wrong time."""

from __future__ import annotations

import array
import fcntl
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from benchmarks.soak.place import Place, Trial
from benchmarks.soak.processes import Ended, children, fork_what_it_starts, start
from benchmarks.soak.traces import differences, report_differences
from dpo_lab.runs import run_record
from dpo_lab.training.checkpoint_io import by_step, damage
from tests.conftest import SMALL
from tests.support.sweeping import contents

NAME = "soak"
SETTINGS = [
    *SMALL,
    *"trainer.max_steps=12 trainer.val_check_interval=4 trainer.log_every_n_steps=3 evals.num_prompts=8".split(),
    *f"callbacks.checkpoint.every_n_steps=2 name={NAME} evals.evaluators=[preference,kl,reward]".split(),
]
TRAIN = ["dpo_lab.train", *SETTINGS]
TWO_RANKS = [*TRAIN, "trainer=ddp_cpu"]
FIT = ["benchmarks.soak.small", "run"]
REPORTED = 0.25  # of the runs
FULL = ("File too large", "No space left on device")
LOCKED = ("Permission denied", "Operation not permitted", "Read-only file system")
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10  # of Linux's files


def run_folder(cwd: Path) -> Path:
    """Where the one run of a folder lies."""
    return next((cwd / "outputs" / NAME).glob("*/seed=0"), cwd / "outputs" / NAME)


def _has_begun(trial: Trial) -> Callable[[], bool]:
    return lambda: bool(by_step(run_folder(trial.cwd) / run_record.CHECKPOINTS))


def small(place: Place) -> None:
    """The small fit, without a command."""
    twin, duration = place.twin("fit", FIT)
    trial = place.trial("fit")
    folder = trial.cwd / FIT[-1]
    while not trial.is_hopeless():
        ended = trial.disturb(FIT, duration, resumes=lambda: bool(by_step(folder / run_record.CHECKPOINTS)))
        if ended.code == 0:
            trial.compared(differences(folder, twin / FIT[-1]))
            break


def one_process(place: Place) -> None:
    """The real command."""
    _killed(place, "train", TRAIN)


def wrong_clock(place: Place) -> None:
    """The same; the clock of each start jumps back and forth by days."""
    _killed(place, "clock-jumps", TRAIN, clock=True)


def ranks(place: Place) -> None:
    """The real command, with two ranks that are forks, too."""
    _killed(place, "2-ranks", TWO_RANKS, before=fork_what_it_starts)


def fresh_ranks(place: Place) -> None:
    """Two ranks as a user has them, every process a fresh interpreter; the twin is the forks'."""
    _killed(place, "2-ranks-fresh", TWO_RANKS, later=8.0, fresh=True)


def _killed(
    place: Place, kind: str, command: Sequence[str], *, clock: bool = False, later: float = 0.0, **settings: Any
) -> None:
    """Start it until it is done. later: seconds that it takes to begin and its twin did not."""
    twin, duration = twin_of(place, command)
    trial = place.trial(kind)
    trial.quiet = command is not TWO_RANKS  # a rank whose peer is gone says where it noticed
    settings["aim"] = _itself if trial.quiet else _any_rank(trial)
    settings["resumes"] = _has_begun(trial)
    while not trial.is_hopeless():
        if clock:
            settings["before"] = _jumping(trial.random.random())
        if trial.disturb(command, later + duration, **settings).code == 0:
            # TensorBoard sorts its files by their names, which say when: no promise of ours, whose record knows better
            trial.compared(differences(run_folder(trial.cwd), run_folder(twin), tensorboard=not clock))
            if trial.random.random() < REPORTED:
                trial.compared(report_differences(trial.cwd, twin, f"outputs/{NAME}"), "reports")
            break


def twin_of(place: Place, command: Sequence[str]) -> tuple[Path, float]:
    """The undisturbed twin: twice over, as the first fills the cache."""
    kind = "two" if command is TWO_RANKS else "one"
    before = fork_what_it_starts if command is TWO_RANKS else None
    warm_up = [f"name={NAME}_first" if setting.startswith("name=") else setting for setting in command]
    return place.twin(kind, warm_up, command, before=before)


def _itself(pid: int) -> int:
    return pid


def _any_rank(trial: Trial) -> Callable[[int], int]:
    """One of the supervisor and its ranks, of those that are there."""

    def aim(pid: int) -> int:
        return trial.random.choice([pid, *list(children(pid))[:2]])

    return aim


def _jumping(seed: float) -> Callable[[], None]:
    """Let this process see a wall clock that jumps at every few looks."""

    def jump() -> None:
        luck, real, off = random.Random(seed), time.time, [0.0]

        def now() -> float:
            if luck.random() < 0.3:
                off[0] = luck.uniform(-1e6, 1e6)
            return real() + off[0]

        class Jumping(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime.fromtimestamp(now(), tz)

        time.time = now
        run_record.datetime = Jumping  # type: ignore[misc]

    return jump


def full_disk(place: Place) -> None:
    """Files may grow to so many bytes and no further, which a write is told as it is told that the disk is full."""
    twin, duration = twin_of(place, TRAIN)
    trial = place.trial("disk-full")
    largest = max(path.stat().st_size for path in run_folder(twin).rglob("*") if path.is_file())
    trial.disturb(TRAIN, duration, resumes=_has_begun(trial))
    for _ in range(3):
        limit = int(8192 * (1.2 * largest / 8192) ** trial.random.random())  # of all sizes alike
        folder = run_folder(trial.cwd) / run_record.CHECKPOINTS
        whole = {step: path.read_bytes() for step, path in by_step(folder).items() if damage(path) is None}
        ended = start(TRAIN, trial.cwd, before=lambda limit=limit: _starve(limit))
        trial.note(ended, {0, 1}, resumes=bool(whole), fault=ended.code == 1)
        if ended.code == 1:
            _check_one_line(trial, ended, FULL, f"with files of at most {limit} bytes")
        for path in by_step(run_folder(trial.cwd) / run_record.CHECKPOINTS).values():
            if damage(path) is not None:
                trial.trouble(f"{path}: damaged by a disk that was full at {limit} bytes")
        still = by_step(run_folder(trial.cwd) / run_record.CHECKPOINTS)
        if whole and not any(step >= max(whole) for step in still):
            trial.trouble(f"{folder}: step={max(whole)}.ckpt was lost to a disk that was full at {limit} bytes")
        if trial.is_hopeless():
            return
    _finish(trial, twin)


def _starve(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def read_only(place: Place) -> None:
    """Nothing in the folder can be written: whatever lies there, the start says so in a line and changes nothing."""
    twin, duration = twin_of(place, TRAIN)
    trial = place.trial("read-only")
    trial.disturb(TRAIN, duration)
    is_done = (run_record.read_record(run_folder(trial.cwd)) or {}).get("status") == "done"
    outputs = trial.cwd / "outputs"
    before = contents(outputs)
    try:
        with locked(outputs):
            ended = start(TRAIN, trial.cwd)
    except OSError as error:
        place.tell(
            {"kind": trial.kind, "skipped": f"{outputs} can't be made read-only for this user: {error.strerror}"}
        )
        return
    trial.note(ended, {0} if is_done else {1, 2}, fault=ended.code != 0)
    if not is_done:
        _check_one_line(trial, ended, LOCKED, "where nothing can be written")
    if contents(outputs) != before:
        trial.trouble(f"{outputs}: a start that could not write changed something")
    if not trial.is_hopeless():
        _finish(trial, twin)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody can write in a folder: by its permissions, or, as they stop no root, by making all in it immutable.

    Raises OSError where neither can be.
    """
    all_of_it = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in all_of_it}
    try:
        for path in all_of_it:
            _make_immutable(path, True) if os.geteuid() == 0 else path.chmod(modes[path] & ~0o222)
        yield
    finally:
        for path in all_of_it:
            _make_immutable(path, False) if os.geteuid() == 0 else path.chmod(modes[path])


def _make_immutable(path: Path, immutable: bool) -> None:
    """As `chattr +i` and `chattr -i`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(handle, GET_FLAGS, flags)
        flags[0] = flags[0] | IMMUTABLE if immutable else flags[0] & ~IMMUTABLE
        fcntl.ioctl(handle, SET_FLAGS, flags)
    finally:
        os.close(handle)


def _check_one_line(trial: Trial, ended: Ended, reasons: Sequence[str], when: str) -> None:
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if len(lines) != 1 or not any(reason in lines[0] for reason in reasons):
        trial.trouble(f"{trial.cwd}: {when} a start ended with {ended.code} and said not why, in one line: {lines}")


def _finish(trial: Trial, twin: Path) -> None:
    ended = start(TRAIN, trial.cwd)
    trial.note(ended, {0}, resumes=True)
    trial.compared(differences(run_folder(trial.cwd), run_folder(twin)))
