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
from dpo_lab.studies.spec import Arm, Study, StudyError

__all__ = ["NotMeasured", "RunData", "RunSet", "gather"]

SWEEP = "sweep.json"
BASELINES = (grouping.DEFAULT_ARM, "ablation=none")  # what the arm without an intervention is called


def gather(paths: Sequence[Path]) -> list[RunSet]:
    """Every study that is a path (a folder, or a kept record's file) or lies below one, each a collection; then all other
    paths' runs, compared as one.

    A folder that holds studies is taken for these alone, not for the runs that they share. Raises StudyError where a path
    holds nothing of ours.
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
    """Folders that hold a file of that name, sorted, nothing below them; not what a run set aside."""
    for root, folders, files in os.walk(path):
        folders[:] = [] if name in files else sorted(f for f in folders if not f.startswith(("earlier-", ".")))
        if name in files:
            yield Path(root)


def _of_study(folder: Path) -> RunSet:
    try:
        record = json.loads((folder / STUDY).read_text())
        study = Study.from_record(record["study"])
        cells = {(cell["arm"], cell["seed"]): cell for cell in record["cells"]}
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{folder / STUDY}: no record of a study ({error}); type the study's command again") from None
    known = [(arm.name, seed) for arm in study.arms for seed in study.seeds if (arm.name, seed) in cells]
    return assemble(study, folder, record, [_of_cell(folder, *cell, cells[cell]) for cell in known])


def _of_cell(folder: Path, arm: str, seed: int, cell: Mapping[str, Any]) -> RunData:
    """What its run's record says, or, of one that never got so far or was killed, what its study saw of it."""
    run = _of_folder(Path(os.path.normpath(folder / cell["folder"])), arm, seed)
    if run.status in ("missing", "running") and cell["status"] != "done":
        run = replace(run, status=cell["status"], error=cell.get("error"))
    return replace(run, log=cell.get("log"))


def _of_folder(folder: Path, arm: str, seed: int) -> RunData:
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


def _of_runs(trees: Sequence[Path], folders: Sequence[Path]) -> RunSet:
    runs = [_of_folder(folder, "", 0) for folder in folders] + [run for tree in trees for run in _unmade(tree)]
    typed = [run.record.get("overrides", ()) for run in runs]
    configs = [grouping.settings(run.record["config"]) if "config" in run.record else None for run in runs]
    told: dict[str, Mapping[str, Any]] = {}
    named: list[RunData] = []
    taken: Counter[tuple[str, int]] = Counter()
    for run, name, config in zip(runs, grouping.names(typed, configs), configs, strict=True):
        seed = _seed(run)
        taken[name, seed] += 1
        if (copies := taken[name, seed]) > 1:
            name = f"{name} ({copies})"  # the same run once more, in another folder
        told[name] = told.get(name) or config or {}
        named.append(replace(run, arm=name, seed=seed))
    at = grouping.axes({name: config for name, config in told.items() if config})
    every = [Arm(name, at=at.get(name, {})) for name in sorted(told, key=grouping.in_order)]
    place = {arm.name: number for number, arm in enumerate(every)}
    named.sort(key=lambda run: (place[run.arm], run.seed))
    baseline = next((name for name in BASELINES if name in told and len(told) > 1), None)
    title = ", ".join(tree.resolve().name for tree in trees)
    return RunSet(title, trees[0], every, sorted({run.seed for run in named}), named, baseline)


def _unmade(tree: Path) -> Iterator[RunData]:
    """The cells of sweeps below a folder that left no record of their own: they failed before that, or never started."""
    for folder in _below(tree, SWEEP):
        try:
            cells = json.loads((folder / SWEEP).read_text())["cells"]
        except (ValueError, KeyError):
            continue  # what did run stands in the runs' own records
        for cell in cells:
            place = folder.joinpath(*Path(cell["folder"]).parts[-2:])  # <overrides>/seed=N
            if not (place / RECORD).exists():
                typed = {"overrides": cell["overrides"]}
                yield RunData(place, "", 0, cell["status"], cell.get("error"), typed, log=cell.get("log"))


def _seed(run: RunData) -> int:
    if "config" in run.record:
        return int(run.record["config"].get("seed", 0))
    return next((int(o.partition("=")[2]) for o in run.record.get("overrides", ()) if o.startswith("seed=")), 0)
