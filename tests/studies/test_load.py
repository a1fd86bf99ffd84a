"""From folders to what is compared: studies, sweeps, trees of runs; which runs are whose; and two hundred of them at once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_lab.reporting import results_md
from dpo_lab.runs.renamed_keys import present_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies import archive, grouping
from dpo_lab.studies import verdicts as effects
from dpo_lab.studies.load import NotMeasured, gather
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.scales import Scale
from dpo_lab.studies.spec import RENAMED_PREDICTION_KEYS, Arm, Measure, Missing, Study, StudyError
from tests.support import a_study

FINDING = {
    "name": "noise memorised",
    "severity": "warning",
    "message": "it is",
    "threshold": "60 %",
    "suggestion": "less",
}


def write_run(folder: Path, overrides: list[str], metrics: dict[str, float] | None = None, **entries: Any) -> Path:
    """A run's folder, by `key=value` overrides over a few settings; done if it has metrics."""
    config: dict[str, Any] = {"beta": 0.1, "seed": 0, "name": "dpo", "loss": {"kind": "dpo", "beta": 0.1}}
    config |= {"optim": {"lr": 1e-4}, "trainer": {"max_steps": 100, "devices": 1}}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        node = config
        for part in key.split(".")[:-1]:
            node = node[part]
        node[key.split(".")[-1]] = json.loads(value) if value[0].isdigit() else value
    config["loss"]["beta"] = config["beta"]
    config["noise"] = {"kind": "symmetric", "rate": 0.0, "seed": config["seed"]}
    record = {"status": "done" if metrics is not None else "failed", "started": a_study.BEGUN, "config": config}
    record |= {"overrides": overrides, "git": {"commit": "0" * 40, "dirty": False}, "versions": {"torch": "2.0"}}
    if metrics is not None:
        record["metrics"] = {name: Estimate(value, 0.1, 9).as_record() for name, value in metrics.items()}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record | entries))
    return folder


def write_study(folder: Path, study: Study, jobs: list[dict[str, Any]], **entries: Any) -> Path:
    folder.mkdir(parents=True)
    stood = [
        {"digest": "another", "at": "2026-11-01T00:00:00+00:00"},
        {"digest": study.digest(), "at": a_study.REGISTERED},
    ]
    record = {"schema": 1, "study": study.as_record(), "budget": "full", "command": "python -m dpo_lab.study x.yaml"}
    record |= {"status": "done", "registrations": stood, "jobs": jobs} | entries
    (folder / "study.json").write_text(json.dumps(record))
    return folder


def job(arm: str, seed: int, folder: str, status: str = "done", **entries: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "folder": folder,
        "overrides": [],
        "status": status,
        "error": None,
        "log": None,
    } | entries


def test_a_study_has_every_arm_by_seed_and_says_how_each_stands(tmp_path: Path):
    study = a_study.study(["base", "arm"], [a_study.predicts("arm")], seeds=3)
    for arm in ("base", "arm"):
        write_run(tmp_path / "runs/full" / arm / "seed=0", [], {"gold_gain": 1.0})
    write_run(tmp_path / "runs/full/arm/seed=1", [], status="running", error=None)
    write_run(tmp_path / "runs/full/base/seed=1", [], error="ValueError: too bad")
    (tmp_path / "runs/full/base/seed=2").mkdir()
    (tmp_path / "runs/full/base/seed=2/run.json").write_text('{"status": "do')
    jobs = [
        job("base", 0, "../../runs/full/base/seed=0"),
        job("arm", 0, "../../runs/full/arm/seed=0", "not started"),  # its record is newer, and the truth
        job("base", 1, "../../runs/full/base/seed=1", "failed", error="exit code 1", log="a.log"),
        job("arm", 1, "../../runs/full/arm/seed=1", "failed", error="it was killed"),
        job("base", 2, "../../runs/full/base/seed=2"),
        job("gone", 0, "../../runs/full/gone/seed=0"),  # an arm that the study had once
    ]
    (found,) = gather([write_study(tmp_path / "example/full", study, jobs)])
    assert (found.title, found.baseline, found.seeds) == ("An example", "base", [0, 1, 2])
    told = {(run.arm, run.seed): (run.status, run.error) for run in found.runs}
    unreadable = told.pop(("base", 2))
    assert told == {
        ("base", 0): ("done", None),
        ("base", 1): ("failed", "ValueError: too bad"),
        ("arm", 0): ("done", None),
        ("arm", 1): ("failed", "it was killed"),
        ("arm", 2): ("missing", None),
    }
    assert unreadable[0] == "unreadable"
    assert "run.json: can't be read" in str(unreadable[1])
    run = found.run("arm", 0)
    assert run is not None
    assert run.folder == tmp_path / "runs/full/arm/seed=0"
    assert found.values("arm", "gold_gain") == {0: 1.0}
    assert (
        gather([tmp_path])[0].folder == found.folder
    )  # found below a folder, and its runs are no collection of their own


@pytest.mark.parametrize(
    ("started", "is_early"), [("2026-11-20T07:59:59+00:00", True), ("2026-11-20T09:00:01+01:00", False)]
)
def test_a_run_begun_before_the_prediction_stood_makes_a_study_exploratory(
    tmp_path: Path, started: str, is_early: bool
):
    study = a_study.study(["base", "arm"], seeds=1)
    write_run(
        tmp_path / "base", [], {}, started="2020-01-01T00:00:00+00:00"
    )  # the baseline is what others are held against
    write_run(tmp_path / "arm", [], {}, started=started)
    jobs = [job("base", 0, "../base"), job("arm", 0, "../arm")]
    (found,) = gather([write_study(tmp_path / "study", study, jobs)])
    assert found.is_exploratory is is_early
    text = (tmp_path / "study" / "study.json").read_text()
    (tmp_path / "study" / "study.json").write_text(text.replace('"jobs"', '"cells"'))  # as earlier versions wrote it
    assert gather([tmp_path / "study"])[0].runs == found.runs
    assert [run.is_confirmatory for run in found.runs] == [True, not is_early]
    level = a_study.predicts(
        "base", measure=Measure.level, value=0.0
    )  # what is measured itself may not have been known
    (found,) = gather([write_study(tmp_path / "level", a_study.study(["base", "arm"], [level], seeds=1), jobs)])
    assert found.is_exploratory


def test_of_several_registrations_the_last_of_this_very_prediction_counts(tmp_path: Path):
    study = a_study.study(["base", "arm"], seeds=1)
    write_run(tmp_path / "arm", [], {})
    jobs = [job("arm", 0, "../arm")]
    for number, (digests, expected) in enumerate(
        [((study.digest(), "0000"), False), (("0000", study.digest()), True), (("0000",), True)]
    ):
        at = ("2026-11-20T08:00:00+00:00", "2026-11-20T10:00:00+00:00")
        stood = [{"digest": digest, "at": when} for digest, when in zip(digests, at, strict=False)]
        (found,) = gather([write_study(tmp_path / f"study {number}", study, jobs, registrations=stood)])
        assert found.is_exploratory is expected


def test_a_run_tells_its_figures_by_name(tmp_path: Path):
    seconds = {"prepare": {"wall": 9.0, "cpu": 1.5}, "dpo": {"wall": 9.0, "cpu": 20.0}}
    memory = {"weights": 2.0, "note": "counted"}
    entries = {
        "seconds": seconds,
        "memory": memory,
        "health": [FINDING],
        "peak_memory_bytes": 7,
        "step_zero_loss": 0.69,
    }
    folder = write_run(tmp_path / "a/seed=0", [], {"kl": 2.0, "gold": 3.0, "initial/gold": 1.0, "zero": 0.0}, **entries)
    (found,) = gather([folder])
    (run,) = found.runs
    expected = {
        "kl": 2.0,
        "gold - initial/gold": 2.0,
        "gold / kl": 1.5,
        "seconds": 21.5,
        "seconds/dpo": 20.0,
        "memory/weights": 2.0,
        "health/noise_memorised": 1.0,
        "health/too_easy": 0.0,
        "peak_memory_bytes": 7.0,
        "step_zero_loss": 0.69,
    }
    assert {name: run.value(name) for name in expected} == expected
    for name in ("no_such", "kl - no_such", "health/no_such", "seconds/sft", "memory/note", "a + b", "kl / zero"):
        with pytest.raises(NotMeasured, match=r"default, seed 0|a \+ b: type one name"):
            run.value(name)
    assert run.log_rows() == []
    assert run.examples() == {}
    assert found.cpu_seconds() == found.cpu_seconds_a_run() == 21.5


@pytest.mark.parametrize("key", ["jobs", "cells"])  # the second one in records of earlier versions
def test_a_sweep_is_told_apart_by_what_was_typed_and_its_failed_jobs_are_there(key, tmp_path: Path):
    sweep = tmp_path / "outputs/sweep"
    for beta in ("0.05", "0.1", "1", "10"):
        for seed in (0, 1):
            typed = ["name=sweep", "optim.lr=3e-4", f"beta={beta}", f"seed={seed}"]
            write_run(sweep / f"beta={beta},optim.lr=3e-4/seed={seed}", typed, {"kl": float(beta)})
    write_run(sweep / "beta=1,optim.lr=3e-4/seed=0/earlier-1", [], {"kl": 9.0})  # set aside
    lost = {"overrides": ["name=sweep", "optim.lr=3e-4", "beta=nan", "seed=1"], "status": "failed", "error": "no beta"}
    jobs = [lost | {"folder": "outputs/sweep/beta=nan,optim.lr=3e-4/seed=1", "log": "x.log"}]
    (sweep / "sweep.json").write_text(json.dumps({key: jobs}))
    (found,) = gather([sweep])
    assert [arm.name for arm in found.arms] == ["beta=0.05", "beta=0.1", "beta=1", "beta=10", "beta=nan"]
    assert found.arms[0].axes == {"beta": 0.05}
    assert (found.title, found.baseline, found.study, found.is_exploratory) == ("sweep", None, None, False)
    assert found.values("beta=10", "kl") == {0: 10.0, 1: 10.0}
    assert [(r.seed, r.status, r.error) for r in found.runs if r.arm == "beta=nan"] == [(1, "failed", "no beta")]


def test_runs_of_any_folders_are_compared_as_one(tmp_path: Path):
    write_run(tmp_path / "one/default/seed=0", [], {"kl": 1.0})
    write_run(tmp_path / "one/explicit/seed=1", ["beta=0.1", "seed=1"], {"kl": 1.5})  # the same settings, typed
    write_run(tmp_path / "two/slow/seed=0", ["optim.lr=1e-5", "trainer.max_steps=50"], {"kl": 0.2})
    write_run(tmp_path / "three/again/seed=0", [], {"kl": 1.1})
    (found,) = gather([tmp_path / "one", tmp_path / "two", tmp_path / "three"])
    assert [arm.name for arm in found.arms] == ["default", "default (2)", "optim.lr=1e-5, trainer.max_steps=50"]
    assert found.baseline == "default"
    assert found.values("default", "kl") == {0: 1.0, 1: 1.5}
    assert found.values("default (2)", "kl") == {0: 1.1}
    assert found.arms[2].axes == {"optim.lr": 1e-5, "trainer.max_steps": 50.0}
    assert effects.versus_baseline(found, "kl")["default"].mean.value == pytest.approx(1.5**0.5)


def test_arms_that_were_typed_alike_are_told_apart_by_their_settings():
    configs = [{"data.path": "a.jsonl", "beta": 0.1}, {"data.path": "b.jsonl", "beta": 0.1}]
    assert grouping.names([[], []], configs) == ["default (data.path=a.jsonl)", "default (data.path=b.jsonl)"]
    assert grouping.names([["+ablation=x", "seed=1"], ["seed=2"]], [*configs]) == ["ablation=x", "default"]


@pytest.mark.parametrize(("what", "says"), [("empty", "holds no run"), ("nowhere", "no such folder")])
def test_a_path_without_a_run_is_refused_in_a_line(tmp_path: Path, what: str, says: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=f"{what}: {says}.*type the folder of a run, a sweep or a study"):
        gather([tmp_path / what])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/study.json").write_text("{")
    with pytest.raises(StudyError, match="broken/study.json: not the record of a study"):
        gather([tmp_path / "broken"])


def test_two_hundred_runs_are_read_judged_and_kept_in_seconds(tmp_path: Path):
    betas = [0.01 * 1.3**n for n in range(39)]
    arms_of = [
        Arm("base", [], "", {"beta": 1.0}),
        *(Arm(f"beta {b:.3g}", [f"beta={b}"], "dpo", {"beta": b}) for b in betas),
    ]
    predictions = [a_study.predicts(arm.name) for arm in arms_of[1:]]
    study = a_study.study(arms_of, predictions)
    names = ["gold_gain", "kl", *(f"a_metric_{n}" for n in range(40))]
    jobs = []
    bulk = {"samples": [{"prompt": "p" * 60, "initial": "i" * 200, "trained": "t" * 200}] * 100}  # 50 KB a record
    for number, arm in enumerate(arms_of):
        for seed in study.seeds:
            metrics = dict.fromkeys(names, seed + number * 0.123456789)
            folder = write_run(tmp_path / f"runs/{number}/seed={seed}", [], metrics, **bulk)
            jobs.append(job(arm.name, seed, f"../runs/{number}/seed={seed}"))
            rows = "".join(f'{{"kind": "prompt", "key": "{n}", "response": "{"x" * 200}"}}\n' for n in range(1000))
            if number == 0:
                rows += f'{{"kind": "candidates", "key": "a", "gold": {list(range(128))}}}\n'
            (folder / "examples.jsonl").write_text(rows)
    begun = time.process_time()
    (found,) = gather([write_study(tmp_path / "study", study, jobs)])
    path = archive.write(found, tmp_path / "records")
    results_md.write_results(tmp_path / "records", tmp_path / "RESULTS.md")
    assert time.process_time() - begun < 8
    assert len(found.runs) == 200
    assert path.stat().st_size < 2 * 150_000


def test_a_study_of_an_earlier_version_is_read_and_stays_registered(tmp_path: Path):
    predictions = [
        a_study.predicts("a", min_effect=0.1),
        a_study.predicts("a", "kl", scale=Scale.plain, min_effect=0.2),
    ]
    study = a_study.study(["base", "a"], predictions, missing=Missing.left_out)  # what was registered stays registered
    present = study.as_record()
    added = ("notes", "known", "missing")
    earlier = {key: value for key, value in present.items() if key not in added} | {"found": present["notes"]}
    names = {present: earlier for earlier, present in RENAMED_PREDICTION_KEYS.items()}
    earlier["predictions"] = [
        {names.get(key, key): value for key, value in p.items() if key != "scale"} for p in present["predictions"]
    ]
    earlier["arms"] = [
        {"name": arm["name"], "group": arm["group"], "at": arm["axes"], "overrides": ["policy.rank=4"]}
        for arm in present["arms"]
    ]
    registered = {name: earlier[name] for name in ("predictions", "arms", "claim", "baseline", "seeds")}
    digest = hashlib.blake2b(json.dumps(registered, sort_keys=True).encode(), digest_size=12).hexdigest()
    record = {"study": earlier, "registrations": [{"digest": digest, "at": a_study.REGISTERED}], "cells": []}
    (tmp_path / "study.json").write_text(json.dumps(record))
    (found,) = gather([tmp_path])
    assert found.study is not None
    assert found.study.predictions == study.predictions
    assert [arm.overrides for arm in found.arms] == [["policy.lora.r=4"]] * 2
    assert found.record["registrations"] == [{"digest": found.study.digest(), "at": a_study.REGISTERED}]


PLAIN = {"prompts": None, "third": None, "engine": {"kind": "exact"}}
OWN = {"prompts": {"sha256": "a" * 64, "count": 3}}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((PLAIN, {}), (PLAIN, {}), None),
        ((PLAIN, {}), ({}, {}), None),  # recorded before there were any
        ((PLAIN | {"prompts": "a.txt"}, OWN), (PLAIN | {"prompts": "copy/a.txt"}, OWN), None),  # the same prompts
        ((PLAIN | {"prompts": "a.txt"}, OWN), (PLAIN, {}), "evals.prompts is"),
        (
            (PLAIN | {"prompts": "a.txt"}, OWN),
            (PLAIN | {"prompts": "a.txt"}, {"prompts": {"sha256": "b" * 64, "count": 3}}),  # the file has changed
            "evals.prompts is",
        ),
        ((PLAIN, {}), (PLAIN | {"engine": {"kind": "continuous"}}, {}), 'evals.engine is {"kind": "exact"} in a and'),
        ((PLAIN, {}), (PLAIN | {"third": "x"}, {"third": {"weights": "1"}}), "evals.third is null in a and"),
    ],
)
def test_runs_of_other_prompts_engines_and_third_policies_are_not_compared_quietly(one, other, said):
    runs = []
    for arm, (settings, with_what) in (("a", one), ("b", other)):
        record = {"config": {"loss": {}, "evals": {"num_prompts": 3, **settings}}, "measured_with": with_what}
        runs.append(RunData(Path(arm), arm, 0, "done", record=present_record(record)))
    found = RunSet("runs", Path("runs"), [], [0], runs).incomparable_settings
    assert len(found) == (said is not None)
    assert not said or found[0].startswith(said)
