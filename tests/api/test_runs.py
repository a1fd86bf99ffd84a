"""Runs loaded from their folders: a data frame's numbers are those of run.json, of the log and of the report."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from pandas import DataFrame, isna

from dpo_lab import api, report
from dpo_lab.runs import metrics_log
from dpo_lab.runs.fingerprint import flatten
from dpo_lab.studies.spec import Arm
from tests.support.study_runs import study, write_run, write_study

BETAS = (0.1, 0.3)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A folder of runs: two values of beta, two seeds each, and one that failed."""
    folder = tmp_path_factory.mktemp("made") / "outputs"
    for beta in BETAS:
        for seed in (0, 1):
            arm = Arm(f"beta={beta}", [f"beta={beta}"], axes={"beta": beta})
            write_run(folder / f"beta={beta}" / f"seed={seed}", arm, seed, steps=12)
    crash = Arm("<b>crash</b>", ["optim.lr=1e30"])
    write_run(folder / "crash" / "seed=0", crash, 0, steps=12, status="failed", error="NotFinite: nan")
    return folder


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("studied") / "outputs", seeds=3, steps=6)


def test_the_numbers_of_the_table_are_those_of_run_json(outputs):
    table = api.load_runs(outputs).table(intervals=True)
    assert len(table) == 5
    for row in table.to_dict("records"):
        record = json.loads((Path(row["folder"]) / "run.json").read_text())
        assert (row["seed"], row["status"]) == (record["config"]["seed"], record["status"])
        assert row["beta"] == record["config"]["beta"]
        assert row["optim.lr"] == record["config"]["optim"]["lr"]
        for name in ("kl", "gold_gain", "accuracy"):
            if record["status"] == "done":
                metric = record["metrics"][name]
                assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (metric["value"], *metric["interval"])
            else:
                assert isna(row[name])


def test_the_table_has_columns_of_what_varies_and_no_others(outputs):
    columns = list(api.load_runs(outputs).table(["kl"]).columns)
    assert columns == ["arm", "beta", "optim.lr", "seed", "status", "kl", "folder"]  # loss.beta is beta again


def test_a_run_is_what_its_folder_holds(outputs):
    folder = outputs / "beta=0.1" / "seed=1"
    run, record = api.load_run(folder), json.loads((folder / "run.json").read_text())
    assert (run.folder, run.status) == (folder, "done")
    assert flatten(record["config"]).items() <= flatten(run.config).items()  # beside settings that were added since
    assert {name: each.as_record() for name, each in run.metrics.items()} == record["metrics"]
    logged: dict[int, dict] = {}
    for row in metrics_log.rows(folder / "metrics.jsonl"):
        logged.setdefault(row["step"], {}).update(row)
    history = run.history.set_index("step")
    assert list(history.index) == sorted(logged)
    for step, row in logged.items():
        assert all(history.loc[step, name] == value for name, value in row.items() if name != "step")
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert list(run.examples["key"]) == [line["key"] for line in lines]
    prompts = run.examples.query("kind == 'prompt'")
    assert list(prompts["gold"]) == [line["gold"] for line in lines if line["kind"] == "prompt"]
    assert {path.suffix for path in run.figures} == {".png"}


def as_text(number: float | None) -> str:
    return "" if number is None or math.isnan(number) else repr(float(number))


@pytest.mark.parametrize("baseline", ["beta=0.1", "beta=0.3"])
def test_effects_are_those_of_the_report(baseline, outputs, capsys):
    runs = api.load_runs(outputs)
    compared = runs.compare(baseline, ["kl", "gold_gain"])
    assert report.main([str(outputs), "--baseline", baseline, "--metrics", "kl,gold_gain", "--csv"]) == 0
    reported = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = ["metric", "arm", "value", "low", "high", "difference_value", "difference_low", "difference_high", "p_holm"]
    assert effects(compared) == [tuple(row[name] for name in names) for row in reported]
    assert sum(not isna(p) for p in compared["p_holm"]) == 2  # of the other beta, for each metric


def effects(compared: DataFrame) -> list[tuple]:
    columns = ["value", "low", "high", "difference", "difference_low", "difference_high", "p_holm"]
    return [
        (row["metric"], row["arm"], *(as_text(row[name]) for name in columns)) for row in compared.to_dict("records")
    ]


def test_a_study_has_its_arms_and_verdicts(studied):
    runs = api.load_runs(studied)
    assert runs.baseline == "dpo, beta 0.1"
    assert runs.run("uniform, beta 1.0", 2).config["seed"] == 2
    verdicts = runs.verdicts()
    assert list(verdicts["claim"]) == [prediction.description for prediction in study().predictions]
    assert set(verdicts["verdict"]) <= {"supported", "not supported", "inconclusive"}
    assert set(runs.compare()["metric"]) == set(study().metrics)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda folder: api.load_runs(folder / "nothing"), "nothing: no such folder"),
        (lambda folder: api.load_run(folder), "holds no run.json; type the folder of a run"),
        (
            lambda folder: api.load_runs(folder).compare("beta=7"),
            "beta=7: no such arm in outputs; type one of: beta=0.1",
        ),
        (lambda folder: api.load_runs(folder).compare(metrics=["klo"]), "klo: no run has it; type some of: accuracy"),
        (lambda folder: api.load_runs(folder).run("beta=0.1", 9), "beta=0.1, seed 9: no such run"),
        (lambda folder: api.load_runs(folder).verdicts(), "not a study, so it has no predictions"),
        (lambda folder: api.load_run(folder / "crash" / "seed=0").policy(), "its status is failed, so no policy"),
    ],
)
def test_errors_are_one_line(ask, said, outputs):
    with pytest.raises(api.LabError, match=said) as error:
        ask(outputs)
    assert "\n" not in str(error.value)
