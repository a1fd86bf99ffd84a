"""Load runs for comparison: studies, sweeps and folders of runs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_lab.runs.run_record import RECORD, RunRefused, read_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies import archive, grouping
from dpo_lab.studies.run_data import NotMeasured, RunData, RunSet, assemble
from dpo_lab.studies.spec import RECORD as STUDY
from dpo_lab.studies.spec import Arm, Study, StudyError, present_study

__all__ = ["NotMeasured", "RunData", "RunSet", "gather"]

SWEEP = "sweep.json"
BASELINES = (grouping.DEFAULT_ARM, "ablation=none")  # names of the arm without an intervention


def gather(paths: Sequence[Path]) -> list[RunSet]:
    """Return every study that is a path (a folder, or the file of an archived record) or lies below one, each as a set
    of runs; then the runs of all other paths as one set.

    Of a folder that holds studies only these are returned, not the runs that they share. Raises StudyError if a path
    holds no run.
    """
    studies, trees, folders = [], [], []
    for path in paths:
        if path.suffix == ".json" and path.is_file():
            studies.append(path)
            continue
        if not path.is_dir():
            raise StudyError(f"{path}: no such folder; type the folder of a run, a sweep or a study")
        if found := list(_below(path, STUDY)):
            studies += found
            continue
        trees.append(path)
        folders += (here := list(_below(path, RECORD)))
        if not here and not any(_below(path, SWEEP)):
            raise StudyError(f"{path}: holds no run; type the folder of a run, a sweep or a study")
    collections = [_of_study(it) if it.is_dir() else archive.read(it) for it in dict.fromkeys(studies)]
    return [*collections, _of_runs(trees, list(dict.fromkeys(folders)))] if trees else collections


def _below(path: Path, name: str) -> Iterator[Path]:
    """Yield folders that hold a file of that name, sorted, nothing below them; skip archived attempts (`earlier-*`)."""
    for root, folders, files in os.walk(path):
        folders[:] = [] if name in files else sorted(f for f in folders if not f.startswith(("earlier-", ".")))
        if name in files:
            yield Path(root)


def recorded_jobs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs in the record of a sweep or a study; `cells` is their key in records of earlier versions."""
    return record["jobs"] if "jobs" in record else record["cells"]


def _of_study(folder: Path) -> RunSet:
    try:
        record = present_study(json.loads((folder / STUDY).read_text()))
        study = Study.from_record(record["study"])
        jobs = {(job["arm"], job["seed"]): job for job in recorded_jobs(record)}
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{folder / STUDY}: not the record of a study ({error}); type the study's command again"
        ) from None
    known = [(arm.name, seed) for arm in study.arms for seed in study.seeds if (arm.name, seed) in jobs]
    return assemble(study, folder, record, [_of_job(folder, *place, jobs[place]) for place in known])


def _of_job(folder: Path, arm: str, seed: int, job: Mapping[str, Any]) -> RunData:
    """Return a job's run from its record or, if it has none or was killed, with the status that the study recorded."""
    run = load_run_data(Path(os.path.normpath(folder / job["folder"])), arm, seed)
    if run.status in ("missing", "running") and job["status"] != "done":
        run = replace(run, status=job["status"], error=job.get("error"))
    return replace(run, log=job.get("log"))


def load_run_data(folder: Path, arm: str = "", seed: int = 0) -> RunData:
    """Return the run in a folder; its status is `missing` if there is none, `unreadable` if its record can't be read."""
    try:
        record = read_record(folder)
        if record is None:
            return RunData(folder, arm, seed)
        status = record["status"]
        metrics = record["metrics"] if status == "done" else {}
        estimates = {name: Estimate.from_record(metric) for name, metric in metrics.items()}
    except (RunRefused, KeyError, TypeError, ValueError) as error:
        return RunData(folder, arm, seed, "unreadable", str(error))
    return RunData(folder, arm, seed, status, record.get("error"), record, estimates)


def sweep(folder: Path) -> RunSet:
    """Return the jobs of the last sweep in a folder. Raise StudyError if it holds none."""
    try:
        jobs = recorded_jobs(json.loads((folder / SWEEP).read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"{folder / SWEEP}: not the record of a sweep ({error}); type the sweep's command again"
        ) from None
    places = [_place(folder, job) for job in jobs]
    return _of_runs([folder], [place for place in places if (place / RECORD).exists()])


def _place(folder: Path, job: Mapping[str, Any]) -> Path:
    """Return the folder of a job of the sweep in a folder: <overrides>/seed=N."""
    return folder.joinpath(*Path(job["folder"]).parts[-2:])


def _of_runs(trees: Sequence[Path], folders: Sequence[Path]) -> RunSet:
    runs = [load_run_data(folder, "", 0) for folder in folders] + [
        run for tree in trees for run in _without_record(tree)
    ]
    typed = [run.record.get("overrides", ()) for run in runs]
    configs = [grouping.settings(run.record["config"]) if "config" in run.record else None for run in runs]
    settings: dict[str, Mapping[str, Any]] = {}
    named: list[RunData] = []
    copies: Counter[tuple[str, int]] = Counter()
    for run, name, config in zip(runs, grouping.names(typed, configs), configs, strict=True):
        seed = _seed(run)
        copies[name, seed] += 1
        if (number := copies[name, seed]) > 1:
            name = f"{name} ({number})"  # another copy of the run, in another folder
        settings[name] = settings.get(name) or config or {}
        named.append(replace(run, arm=name, seed=seed))
    at = grouping.axes({name: config for name, config in settings.items() if config})
    every = [Arm(name, axes=at.get(name, {})) for name in sorted(settings, key=grouping.in_order)]
    place = {arm.name: number for number, arm in enumerate(every)}
    named.sort(key=lambda run: (place[run.arm], run.seed))
    baseline = next((name for name in BASELINES if name in settings and len(settings) > 1), None)
    title = ", ".join(tree.resolve().name for tree in trees)
    return RunSet(
        title,
        trees[0],
        every,
        sorted({run.seed for run in named}),
        named,
        baseline,
        baseline_reason="the arm without an intervention" if baseline else "",
        shared=grouping.shared_overrides(typed),
    )


def _without_record(tree: Path) -> Iterator[RunData]:
    """Yield the jobs of sweeps below a folder that have no run record: they failed before it, or never started."""
    for folder in _below(tree, SWEEP):
        try:
            jobs = recorded_jobs(json.loads((folder / SWEEP).read_text()))
        except (ValueError, KeyError):
            continue  # jobs that ran have records of their own
        for job in jobs:
            place = _place(folder, job)
            if not (place / RECORD).exists():
                typed = {"overrides": job["overrides"]}
                yield RunData(place, "", 0, job["status"], job.get("error"), typed, log=job.get("log"))


def _seed(run: RunData) -> int:
    if "config" in run.record:
        return int(run.record["config"].get("seed", 0))
    return next((int(o.partition("=")[2]) for o in run.record.get("overrides", ()) if o.startswith("seed=")), 0)
