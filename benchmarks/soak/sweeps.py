"""Sweeps whose driver is killed or asked to stop at moments drawn, and two that meet in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak.place import BY, ENDS, Place, Trial
from benchmarks.soak.processes import start
from benchmarks.soak.traces import LEFTOVER, differences, report_differences
from benchmarks.soak.trainings import NAME, SETTINGS
from tests.support.sweeping import behaves, contents, starts, until

STAND_IN = ["tests.support.standin", "--multirun", "beta=0.1,0.2,0.3", f"name={NAME}"]
REFUSED = f"error: outputs/{NAME}: another sweep is at work here; wait for it, or type name=another\n"
REAL = ["dpo_lab.train", "--multirun", "beta=0.1,0.3", *SETTINGS, "trainer.max_steps=8"]


def stand_in(place: Place) -> None:
    """Jobs are processes of a command whose runs take no time."""
    twin, duration = place.twin("stand-in", STAND_IN)
    trial = place.trial("sweep-stand-ins")
    if _through(trial, STAND_IN, duration):
        trial.compared([*_check_end(trial.cwd), *_of_records(trial.cwd, twin)])


def real(place: Place) -> None:
    """Jobs are trainings."""
    twin, duration = place.twin("sweep", REAL)
    trial = place.trial("sweep")
    if _through(trial, REAL, duration):
        for folder in _jobs(twin):
            trial.compared(differences(trial.cwd / folder, twin / folder))
        trial.compared(_check_end(trial.cwd))
        trial.compared(report_differences(trial.cwd, twin, f"outputs/{NAME}"), "reports")


def _through(trial: Trial, command: Sequence[str], duration: float, **settings: Any) -> bool:
    """Start the sweep until it is done; whether nothing went wrong on the way."""
    while not trial.is_hopeless():
        done = {folder: contents(trial.cwd / folder) for folder in _done(trial.cwd)}
        begun = len(starts(trial.cwd))
        ended = trial.disturb(command, duration, resumes=lambda done=done: bool(done), **settings)
        for folder, was in done.items():
            if contents(trial.cwd / folder) != was:
                trial.trouble(f"{trial.cwd / folder}: was done, and the next start of the sweep changed it")
        for again in [f for each in starts(trial.cwd)[begun:] for f in done if f"hydra.run.dir='{f}'" in each["argv"]]:
            trial.trouble(f"{trial.cwd / again}: was done, and was started again")
        if ended.code == 0:
            return True
    return False


def _check_end(cwd: Path) -> Iterator[str]:
    """What is not as a sweep leaves it that is done."""
    swept = json.loads((cwd / "outputs" / NAME / "sweep.json").read_text())
    if swept["status"] != "done" or any(job["status"] != "done" for job in swept["jobs"]):
        yield f"{cwd}: the sweep ended with 0, its sweep.json does not say that all is done"
    for path in (cwd / "outputs" / NAME).rglob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            yield f"{path}: left over"


def two_at_once(place: Place) -> None:
    """A sweep that comes to a folder where one is at work is refused and changes no byte; then the first one is stopped."""
    place.twin("stand-in", STAND_IN)
    trial = place.trial("two-sweeps")
    behaves(trial.cwd, beta_0="waits")
    signum, outputs = trial.random.choice(list(BY)), trial.cwd / "outputs"

    def strike(pid: int) -> None:
        until(lambda: any("waiting" in path.read_text() for path in outputs.glob(f"{NAME}/*/*/output.log")), 120)
        before = contents(outputs)
        second = start(STAND_IN, trial.cwd, beside="-second")
        trial.note(second, {2}, fault=True)
        if second.errors != REFUSED:
            trial.trouble(f"{trial.cwd}: the second sweep said: {second.errors[-300:]}")
        if contents(outputs) != before:
            trial.trouble(f"{trial.cwd}: the second sweep changed something")
        os.kill(pid, signum)

    trial.note(start(STAND_IN, trial.cwd, strike=strike), ENDS[signum], hit=BY[signum])
    (trial.cwd / "go").touch()
    if not trial.is_hopeless():
        trial.note(start(STAND_IN, trial.cwd), {0})
        trial.compared(_check_end(trial.cwd))


def _jobs(cwd: Path) -> list[Path]:
    """The folders of a sweep's runs, from where it was started."""
    return sorted(path.parent.relative_to(cwd) for path in (cwd / "outputs" / NAME).glob("*/*/run.json"))


def _done(cwd: Path) -> list[Path]:
    return [folder for folder in _jobs(cwd) if json.loads((cwd / folder / "run.json").read_text())["status"] == "done"]


def _of_records(cwd: Path, twin: Path) -> list[str]:
    """Where the jobs' results differ."""
    told = [
        {folder: json.loads((place / folder / "run.json").read_text())["metrics"] for folder in _jobs(place)}
        for place in (cwd, twin)
    ]
    return [] if told[0] == told[1] else [f"{cwd}: the jobs' metrics are not the twin's"]
