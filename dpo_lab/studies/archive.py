"""The archived record of a study: small, committed, and enough to derive every verdict again.

One JSON file per study, one line per run, numbers to six digits. It holds the study with its predictions and when they
were registered; for every run its status, versions, cost and all metrics; for every seed the optimum's line. It does
not hold curves, samples or single examples.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.renamed_keys import present_finding
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies import frontier
from dpo_lab.studies.run_data import RunData, RunSet, assemble
from dpo_lab.studies.spec import Study, StudyError, present_study

SCHEMA = 1
FOLDER = "records"  # beside the study files and RESULTS.md
OF_STUDY = ("file", "budget", "overrides", "command", "status", "registrations")  # copied from study.json
OF_RUN = ("started", "steps", "step_zero_loss", "peak_memory_bytes", "memory", "data")  # from run.json
ORIGIN = ("versions", "git")
# Columns of a run's trajectory, as far as it has them.
OF_POINT = ("step", "kl", "gold", "gold_gain", "judge", "judge_gain", "reward", "reward_gain", "length", "well_formed")


def archive_study(collection: RunSet) -> dict[str, Any]:
    """Return the archived record of a study. Raises StudyError if the runs belong to no study, or if their arms were
    measured with different settings.
    """
    if collection.study is None:
        raise StudyError(f"{collection.title}: no study; type the folder of one, outputs/studies/NAME/BUDGET")
    for text in collection.incomparable_settings:
        raise StudyError(
            f"{collection.title}: measured with different settings, {text}; run the study again with one setting"
        )
    names = sorted({name for run in collection.runs for name in run.metrics})
    origins: list[Any] = []
    runs = [_archived(run, names, origins) for run in collection.runs]
    lines = {seed: frontier.optimum(collection, seed) for seed in collection.seeds}
    return {
        "schema": SCHEMA,
        "study": collection.study.as_record(),
        **{name: collection.record.get(name) for name in OF_STUDY},
        **({"stopping": collection.record["stopping"]} if "stopping" in collection.record else {}),
        "origins": origins,  # versions and commit of runs, each once
        "optimum": {
            str(seed): [[_short(p.gain), _short(p.kl), _short(p.ess)] for p in points]
            for seed, points in lines.items()
            if points
        },
        "metrics": names,  # order of every run's `metrics`: [value, standard error, n], or null
        "runs": runs,
    }


def write(collection: RunSet, folder: Path) -> Path:
    """Write the archived record of a study to the file that `path_of` names; return its path.

    A record of other predictions that is there already is kept beside it, under its name and the day of its last run.
    """
    record = archive_study(collection)
    path = path_of(folder, record["study"]["name"], record["budget"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and (earlier := read(path)).study is not None and _digest_of(earlier) != _digest_of(collection):
        day = max((str(run.record.get("started") or "")[:10] for run in earlier.runs), default="")
        endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names = (f"{path.stem}-{day or 'earlier'}{ending}.json" for ending in endings)
        path.rename(next(kept for name in names if not (kept := path.with_name(name)).exists()))
    write_atomic(path, text(record))
    return path


def _digest_of(collection: RunSet) -> str:
    assert collection.study is not None
    return collection.study.digest(collection.record.get("stopping"))


def path_of(folder: Path, name: str, budget: str | None) -> Path:
    """Return the path of a study's archived record; a budget other than `full` is part of the name."""
    return folder / (f"{name}.json" if budget in ("full", None) else f"{name}-{budget}.json")


def text(record: Mapping[str, Any]) -> str:
    """Return an archived record as text, one run, arm or prediction per line, so that diffs are readable."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in record.items()) + "\n}\n"


def read(path: Path) -> RunSet:
    """Read the runs of an archived study; `kept_as` in its record is the name of its file.

    Raises StudyError if the file is not an archived record.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']}, this version reads {SCHEMA}")
        record = present_study(record) | {"kept_as": path.stem}
        study = Study.from_record(record["study"])
        overrides = {arm.name: arm.overrides for arm in study.arms}
        runs = [_run(path.parent, run, record, overrides[run["arm"]]) for run in record["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{path}: not an archived record of a study ({error}); archive it again from its folder"
        ) from None
    return assemble(study, path.parent, record, runs)


def _archived(run: RunData, names: Iterable[str], origins: list[Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "status": run.status, "folder": _place(run)}
    if run.error:
        kept["error"] = run.error
    kept |= {name: _rounded(run.record[name]) for name in OF_RUN if run.record.get(name) is not None}
    if origin := {name: run.record[name] for name in ORIGIN if name in run.record}:
        if origin not in origins:
            origins.append(origin)
        kept["origin"] = origins.index(origin)
    if "seconds" in run.record:
        kept["cpu"] = {stage: _short(taken["cpu"]) for stage, taken in run.record["seconds"].items()}
    if "health" in run.record:
        kept["health"] = [
            {name: found[name] for name in ("name", "severity", "message")} for found in run.record["health"]
        ]
    if points := run.record.get("trajectory"):
        columns = [name for name in OF_POINT if name in points[0]]
        kept["trajectory"] = {name: [_rounded(point.get(name)) for point in points] for name in columns}
    if run.metrics:
        kept["metrics"] = [_triple(run.metrics.get(name)) for name in names]
    return kept


def _run(folder: Path, kept: Mapping[str, Any], record: Mapping[str, Any], overrides: list[str]) -> RunData:
    facts: dict[str, Any] = {name: kept[name] for name in OF_RUN if name in kept}
    facts |= {"status": kept["status"], "overrides": [*overrides, f"seed={kept['seed']}"]}
    if "origin" in kept:
        facts |= record["origins"][kept["origin"]]
    if "cpu" in kept:
        facts["seconds"] = {stage: {"cpu": seconds} for stage, seconds in kept["cpu"].items()}
    if "health" in kept:
        facts["health"] = [{"threshold": "", "suggestion": "", **present_finding(found)} for found in kept["health"]]
    if path := kept.get("trajectory"):
        rows = (dict(zip(path, values, strict=True)) for values in zip(*path.values(), strict=True))
        facts["trajectory"] = [{name: value for name, value in row.items() if value is not None} for row in rows]
    triples = zip(record["metrics"], kept.get("metrics", ()), strict="metrics" in kept)
    metrics = {name: Estimate(*triple) for name, triple in triples if triple is not None}
    place = folder / kept["folder"]
    return RunData(place, kept["arm"], kept["seed"], kept["status"], kept.get("error"), facts, metrics)


def _place(run: RunData) -> str:
    """Return the end of a run's path, `full/beta=1/seed=0`, which identifies runs shared between studies."""
    return "/".join(run.folder.parts[-3:]) if "started" in run.record else ""


def _triple(estimate: Estimate | None) -> list[Any] | None:
    if estimate is None:
        return None
    return [_short(estimate.value), None if estimate.se is None else _short(estimate.se), estimate.n]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value)
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _lines(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(each, list | dict) for each in value.values()):
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(each)}" for key, each in value.items()) + "\n}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join("  " + _packed(each) for each in value) + "\n]"
    return _packed(value)


def _packed(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
