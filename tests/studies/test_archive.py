"""Kept records: every verdict can be derived from them again, and the written results are nothing but that."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dpo_lab.reporting import results_md
from dpo_lab.reporting.results_study_md import format_number, study_page
from dpo_lab.stats.text import format_p
from dpo_lab.studies import archive, frontier
from dpo_lab.studies import verdicts as effects
from dpo_lab.studies.load import gather
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Arm, Measure, Prediction, Study, StudyError
from dpo_lab.studies.spec import Direction as To
from dpo_lab.studies.verdicts import decide
from tests.support import a_study

NAMES = ("base", "mild", "strong", "failed")


def example(folder: Path, registered: str = a_study.REGISTERED) -> RunSet:
    """Two arms of a group, one that failed, candidates in every seed."""
    predictions = [
        a_study.predicts("strong", min_effect=0.1),
        a_study.predicts("mild", "kl / gold_gain", direction=To.less, primary=False),
        Prediction("a share of the optimum | *all*", Measure.area, "dpo", To.more, value=0.2),
        a_study.predicts("failed", primary=False),
        a_study.predicts("base", measure=Measure.level, metric="health/too_easy", value=0.1, direction=To.less),
    ]
    arms = [
        "base",
        Arm("mild", ["beta=1"], "dpo", {"beta": 1}),
        Arm("strong", ["beta=.1"], "dpo", {"beta": 0.1}),
        "failed",
    ]
    study = dataclasses.replace(
        a_study.study(arms, predictions), notes="Looked at again:\n\nit is *so*.", metrics=["gold_gain", "kl"]
    )
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=(4, 64))
    rows = [{"kind": "candidates", "key": str(n), "gold": row.tolist()} for n, row in enumerate(candidates)]
    for seed in study.seeds:
        (folder / f"full/base/seed={seed}").mkdir(parents=True, exist_ok=True)
        examples = folder / f"full/base/seed={seed}/examples.jsonl"
        examples.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def values(arm: Arm, seed: int) -> Mapping[str, float] | RunData:
        if arm.name == "failed" or (arm.name, seed) == ("mild", 3):
            return RunData(folder, arm.name, seed, "failed", "NotFinite: <b>nan</b> | at step 3")
        strength = NAMES.index(arm.name) + rng.normal(0, 0.1)
        metrics = {"gold_gain": strength / 3, "kl": strength**2 / 7, "accuracy": 1 / 3}
        origin = {"git": {"commit": "1234567890abcdef", "dirty": seed == 0}, "versions": {"torch": "2.13.0"}}
        run = a_study.run(arm.name, seed, metrics, memory={"weights": 1.0, "policy_bytes": 4_000_000}, **origin)
        return dataclasses.replace(run, folder=folder / "full" / arm.name / f"seed={seed}")

    return a_study.measured(study, values, registered)


def test_a_kept_record_gives_the_same_verdicts_and_tables(tmp_path: Path):
    study = example(tmp_path / "runs")
    path = archive.write(study, tmp_path / "records")
    assert path == tmp_path / "records/example.json"
    (again,) = gather([path])
    assert [run.status for run in again.runs] == [run.status for run in study.runs]
    for (was, one), (now, other) in zip(effects.decide(study), effects.decide(again), strict=True):
        assert was == now
        assert (one.word, one.note, one.seeds, one.missing) == (other.word, other.note, other.seeds, other.missing)
        for name in ("p", "p_holm", "detectable"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3)
        if one.effect is not None and other.effect is not None:
            assert one.effect.value == pytest.approx(other.effect.value, rel=1e-4)
            assert one.effect.interval == pytest.approx(other.effect.interval, rel=1e-4)
    run = again.run("strong", 2)
    assert run is not None
    assert run.metrics["accuracy"].value == 0.333333
    assert run.metrics["accuracy"].n == 512
    assert run.value("memory/policy_bytes") == 4_000_000
    assert run.value("health/too_easy") == 0.0
    assert run.value("seconds/dpo") == 20.0
    assert run.record["overrides"] == ["beta=.1", "seed=2"]
    assert run.record["git"] == {"commit": "1234567890abcdef", "dirty": False}
    assert frontier.optimum(again, 1)[3].gain == pytest.approx(frontier.optimum(study, 1)[3].gain, rel=1e-5)
    assert again.cpu_seconds() == study.cpu_seconds()
    assert archive.text(archive.archive_study(again)) == path.read_text()  # and it can be kept again


def test_arms_that_were_not_measured_alike_are_not_kept(tmp_path: Path):
    study = example(tmp_path / "runs")
    of = {"base": 48, "strong": 24}
    runs = [
        dataclasses.replace(run, record={**run.record, "config": {"evals": {"max_new_tokens": of.get(run.arm, 48)}}})
        for run in study.runs
    ]
    uneven = dataclasses.replace(study, runs=runs)
    with pytest.raises(
        StudyError, match=r"measured with different settings, evals.max_new_tokens is 48 in .*base.* and 24 in strong;"
    ):
        archive.write(uneven, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_kept_record_is_small_one_run_a_line_and_names_no_place(tmp_path: Path):
    path = archive.write(example(tmp_path / "runs"), tmp_path)
    lines = path.read_text().splitlines()
    assert sum('"seed":' in line for line in lines) == 20
    assert sum('"description":' in line for line in lines) == 5
    assert str(tmp_path) not in path.read_text()


def test_what_is_no_kept_record_is_refused_in_a_line(tmp_path: Path):
    path = archive.write(example(tmp_path / "runs"), tmp_path)
    record = json.loads(path.read_text())
    for change in ({"schema": 2}, {"runs": [{"arm": "base"}]}, {"metrics": ["kl"]}, {"study": {}}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(StudyError, match="example.json: not an archived record of a study"):
            archive.read(path)
    path.write_text("{")
    with pytest.raises(StudyError, match="example.json: not an archived record of a study"):
        archive.read(path)
    with pytest.raises(StudyError, match="holds no archived record; archive a study first"):
        results_md.write_results(tmp_path / "runs", tmp_path / "RESULTS.md")


def test_the_results_are_derived_from_the_records_and_a_number_typed_by_hand_fails(tmp_path: Path):
    archive.write(example(tmp_path / "runs"), tmp_path / "records")
    results = tmp_path / "RESULTS.md"
    results_md.write_results(tmp_path / "records", results)
    text = results.read_text()
    assert results_md.check_results(tmp_path / "records", results) == []
    results_md.write_results(tmp_path / "records", results)
    assert results.read_text() == text  # the same bytes
    (number,) = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("| of strong |")]
    row = text.splitlines()[number - 1]
    effect = row.split(" | ")[1].partition(" ")[0]
    results.write_text(text.replace(row, row.replace(f" {effect} ", " 0.999 ", 1)))
    differs = results_md.check_results(tmp_path / "records", results)
    assert [line.partition(": ")[0] for line in differs] == [f"{results}:{number}"] * 2
    assert [line.partition(": ")[2][:2] for line in differs] == ["- ", "+ "]
    assert f" {effect} " in differs[1]
    results.write_text(text + "One line more.\n")
    assert len(results_md.check_results(tmp_path / "records", results)) == 1
    results.unlink()
    with pytest.raises(StudyError, match="no such file; type the same command without --check"):
        results_md.check_results(tmp_path / "records", results)


def test_a_budget_other_than_the_full_one_stands_after_it_under_its_name(tmp_path: Path):
    study = example(tmp_path / "runs")
    for budget in ("cheap", "full"):
        archive.write(dataclasses.replace(study, record={**study.record, "budget": budget}), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["example-cheap.json", "example.json"]
    results_md.write_results(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.index("| **[An example](results/example.md)**") < text.index("| **[An example (budget cheap)](results/")
    pages = {path.stem: path.read_text().splitlines()[0] for path in (tmp_path / "results").glob("*.md")}
    assert pages == {"example": "# An example", "example-cheap": "# An example (budget cheap)"}
    results_md.check_results(tmp_path, tmp_path / "RESULTS.md")
    (tmp_path / "example-cheap.json").unlink()
    assert [
        line
        for line in results_md.check_results(tmp_path, tmp_path / "RESULTS.md")
        if "no record has this page" in line
    ]


def test_a_changed_record_changes_the_results(tmp_path: Path):
    path = archive.write(example(tmp_path / "runs"), tmp_path)
    results_md.write_results(tmp_path, tmp_path / "RESULTS.md")
    record = json.loads(path.read_text())
    ran = next(run for run in record["runs"] if run["arm"] == "strong")
    ran["metrics"][record["metrics"].index("gold_gain")][0] += 0.5
    path.write_text(archive.text(record))
    assert results_md.check_results(tmp_path, tmp_path / "RESULTS.md")


def test_the_results_say_all_that_was_asked_predicted_found_and_not_found(tmp_path: Path):
    study = example(tmp_path / "runs")
    judged = decide(study)
    table = results_md.results([(study, judged)], "records")
    row = "| **[An example](results/example.md)** (2026-11-20, 5 seeds, 0.08 h; [record](records/example.json)) |"
    assert row in table
    assert "| of strong | " in table
    assert " | ● supported |" in table
    assert "of mild" not in table  # it is secondary
    text = study_page(study, judged)
    for part in (
        "    python -m dpo_lab.study ablations/example.yaml",
        "2026-11-20, budget full, 5 seeds; 0.08 h of CPU time; commit 1234567890, 1234567890 with changes.",
        "*Claim:* It does. (A paper, 2024)",
        "| of strong | gold_gain: strong - base |",
        "| of mild (secondary) | kl / gold_gain: mild - base |",
        "a share of the optimum \\| \\*all\\*",
        "inconclusive (not measured; 5 of 5 seeds missing)",
        "inconclusive (1 of 5 seeds missing (bounds): supported without them, inconclusive with them against the",
        "- mild, seed 3: failed: NotFinite: &lt;b>nan&lt;/b> \\| at step 3",
        "- failed, seeds 0, 1, 2, 3, 4: failed: NotFinite",
        "It gains",
        "Looked at again:\n\nit is *so*.",
    ):
        assert part in text, part
    assert "xploratory (" not in text


def test_the_exploratory_label_stands_at_the_verdict(tmp_path: Path):
    study = example(tmp_path / "runs", registered="2026-11-21T00:00:00+00:00")
    label = "inconclusive, exploratory (14 of 20 runs started before it was registered)"
    assert f"**{label}**" in study_page(study, decide(study))
    assert f" | **{label}**<br>" in results_md.results([(study, decide(study))], "records")


def test_runs_that_studies_share_are_counted_once_in_the_total(tmp_path: Path):
    one = example(tmp_path / "runs")
    other = dataclasses.replace(one, title="Another")
    text = results_md.results([(study, decide(study)) for study in (one, other)], "records")
    assert "| **[Another](results/example.md)** (2026-11-20, 5 seeds, 0.08 h;" in text
    assert "All studies took 0.08 h of CPU" in text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.123456, "0.123"),
        (-1.5, "-1.5"),
        (12345.6, "12,346"),
        (0.0000123, "1e-05"),
        (-0.00049, "-0.0005"),
    ],
)
def test_a_figure_has_three_digits_that_count(value: float, told: str):
    assert format_number(value) == told


def test_a_p_value_is_written_as_in_papers():
    assert [format_p(p) for p in (None, 0.00012, 0.0214, 1.0)] == ["", "< .001", ".021", "1.000"]


def test_a_record_of_other_predictions_is_kept_beside_the_new_one(tmp_path: Path):
    study = example(tmp_path / "runs")
    archive.write(study, tmp_path)
    assert archive.write(study, tmp_path) == tmp_path / "example.json"
    assert len(list(tmp_path.glob("*.json"))) == 1  # of the same predictions: replaced
    before = archive.read(tmp_path / "example.json")
    assert study.study is not None
    rewritten = dataclasses.replace(study.study, predictions=[a_study.predicts("strong", min_effect=0.2)])
    runs = [run for run in study.runs if run.is_done or run.error]

    def measured(of: Study) -> RunSet:
        return a_study.measured(of, lambda arm, seed: next(r for r in runs if (r.arm, r.seed) == (arm.name, seed)))

    archive.write(measured(rewritten), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["example-2026-11-20.json", "example.json"]
    kept = archive.read(tmp_path / "example-2026-11-20.json")
    assert effects.decide(kept) == effects.decide(before)
    assert not kept.is_exploratory
    results_md.write_results(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "[An example, earlier predictions (2026-11-20)](results/example-2026-11-20.md)" in text
    assert (tmp_path / "results/example.md").is_file()
    archive.write(
        measured(dataclasses.replace(rewritten, claim="Written again.")), tmp_path
    )  # with runs of the same day
    names = ["example-2026-11-20-2.json", "example-2026-11-20.json", "example.json"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == names
    assert effects.decide(archive.read(tmp_path / "example-2026-11-20.json")) == effects.decide(before)
