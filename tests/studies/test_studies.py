"""Studies: their files, what is registered before a run, their jobs as one sweep, what becomes of a study cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo_lab.config import schema
from dpo_lab.reporting import results_md
from dpo_lab.studies import archive
from dpo_lab.studies.run_data import EVAL_SETTINGS_THAT_MUST_MATCH
from dpo_lab.studies.scales import Scale
from dpo_lab.studies.spec import Direction, Missing, Study, StudyError, present_study
from dpo_lab.sweeps.study_file import read
from dpo_lab.sweeps.study_run import StudyRun
from tests.conftest import REPOSITORY
from tests.conftest import SMALL as SMALL_RUN
from tests.support.sweeping import ENVIRONMENT, behaves, run, starts, until

pytestmark = pytest.mark.slow

COLLECTION = sorted((REPOSITORY / "ablations").glob("*.yaml"))
RECORDS = sorted((REPOSITORY / "ablations/records").glob("*.json"))
BUDGETS = [(path, budget) for path in COLLECTION for budget in yaml.safe_load(path.read_text())["budgets"]]

SMALL = {
    "title": "Accuracy and beta",
    "question": "Does the stand-in get better with beta?",
    "claim": "It does.",
    "source": "its code",
    "baseline": "beta=0.1",
    "arms": [{"sweep": {"beta": [0.1, 1]}}, {"name": "flips", "overrides": ["noise=symmetric", "noise.rate=0.2"]}],
    "metrics": ["accuracy"],
    "predictions": [
        {"description": "beta 1 is more", "measure": "difference", "metric": "accuracy"}
        | {"treatment": "beta=1", "control": "beta=0.1"}
        | {"direction": "more", "min_effect": 0.1}
    ],
    "budgets": {"full": {"seeds": [0, 1]}, "quick": {"seeds": [0], "arms": ["beta=0.1", "beta=1"]}},
}


def written(folder: Path, name: str = "small", **changes: Any) -> Path:
    path = folder / "ablations" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run("tests.support.standin_study", folder, *arguments)


def record(folder: Path, name: str = "small", budget: str = "full") -> dict:
    return json.loads((folder / "outputs/studies" / name / budget / "study.json").read_text())


@pytest.mark.parametrize(("path", "budget"), BUDGETS, ids=[f"{path.stem}-{budget}" for path, budget in BUDGETS])
def test_every_study_of_the_collection_is_whole(path, budget):
    made = read(path, budget)
    assert made.predictions
    assert any(prediction.primary for prediction in made.predictions)
    assert Study.from_record(made.as_record()) == made
    assert len({tuple(sorted(arm.overrides)) for arm in made.arms}) == len(made.arms)


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_a_kept_record_is_of_its_study_as_it_was_registered(path):
    """As the file has it now or, if its predictions were rewritten since, with what the record had shown told in it."""
    record = present_study(json.loads(path.read_text()))
    assert record["overrides"] == []
    stopping = record.get("stopping")
    kept = Study.from_record(record["study"])
    assert record["registrations"][-1]["digest"] == kept.digest(stopping)
    assert not archive.read(path).is_exploratory
    made = read(REPOSITORY / record["file"], record["budget"])
    if kept.digest(stopping) == made.digest(stopping):
        assert kept.notes == made.notes
    else:
        assert made.known
    if kept.missing is Missing.left_out:  # of a version without scales
        assert {prediction.scale for prediction in kept.predictions} == {Scale.plain}


def test_the_written_results_are_what_the_kept_records_say():
    assert RECORDS
    assert results_md.check_results(REPOSITORY / "ablations/records", REPOSITORY / "ablations/RESULTS.md") == []


def test_every_kind_of_arm_in_the_collection_composes():
    """The keys that an arm sets beside those of all arms, and each budget once."""
    kinds: dict[object, list[str]] = {}
    for path, budget in BUDGETS:
        arms = read(path, budget).arms
        of_all = set.intersection(*(set(arm.overrides) for arm in arms))
        kinds[path, budget] = arms[0].overrides
        for arm in arms:
            own = [o for o in arm.overrides if o not in of_all and not o.startswith("beta=")]
            named = frozenset(o if o.split("=")[0].isidentifier() else o.split("=")[0] for o in own)
            kinds.setdefault(named, arm.overrides)
    schema.register()
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        for overrides in kinds.values():
            schema.validate(compose("train", overrides))


def test_arms_of_a_study_are_measured_alike():
    @cache
    def measured_by(*overrides: str) -> str:
        evals = OmegaConf.to_container(compose("train", list(overrides)).evals, resolve=True)
        return json.dumps([evals[name] for name in EVAL_SETTINGS_THAT_MUST_MATCH])

    schema.register()
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        for path, budget in BUDGETS:
            kinds = {
                tuple(sorted(o for o in arm.overrides if o.startswith(("data", "evals"))))
                for arm in read(path, budget).arms
            }
            assert len({measured_by(*kind) for kind in kinds}) == 1, (path.stem, budget)


def test_a_sweep_is_short_for_arms(tmp_path):
    arms = [
        {"name": "first", "axes": {"beta": 0.1}, "overrides": ["beta=0.1"]},
        {"group": "g", "overrides": ["noise=symmetric"], "sweep": {"beta": [0.5, 1], "optim.lr": [1e-4]}},
    ]

    def overrides(beta: float) -> list[str]:
        return ["a=1", "noise=symmetric", f"beta={beta:g}", "optim.lr=0.0001", "z=2"]

    made = read(written(tmp_path, arms=arms, baseline="first", predictions=[], settings=["a=1"]), more=["z=2"])
    assert [(arm.name, arm.group, arm.axes, arm.overrides) for arm in made.arms] == [
        ("first", "", {"beta": 0.1}, ["a=1", "beta=0.1", "z=2"]),
        *(
            (f"g, beta={beta:g}, optim.lr=0.0001", "g", {"beta": beta, "optim.lr": 1e-4}, overrides(beta))
            for beta in (0.5, 1.0)
        ),
    ]
    assert [arm.name for arm in made.members("g")] == [arm.name for arm in made.arms[1:]]


def test_a_budget_leaves_out_predictions_about_arms_that_it_leaves_out(tmp_path):
    about_flips = dict(SMALL["predictions"][0], treatment="flips")  # type: ignore[index]
    path = written(tmp_path, predictions=[*SMALL["predictions"], about_flips])  # type: ignore[misc]
    assert [len(read(path, budget).predictions) for budget in ("full", "quick")] == [2, 1]


def test_what_was_found_is_told_under_the_budget_that_found_it(tmp_path):
    path = written(tmp_path, notes="Much.", budgets={"full": {"seeds": [0]}, "far": {"seeds": [0], "notes": "Little."}})
    assert [read(path, budget).notes for budget in ("full", "far")] == ["Much.", "Little."]


PREDICTION = SMALL["predictions"][0]  # type: ignore[index]


def test_a_budget_s_settings_take_the_place_of_an_arm_s(tmp_path):
    arms = [
        {"name": "base", "overrides": ["beta=0.1"]},
        {"name": "long", "overrides": ["trainer.max_steps=100", "beta=0.2"]},
    ]
    budgets = {"full": {"seeds": [0]}, "quick": {"seeds": [0], "settings": ["trainer.max_steps=8"]}}
    path = written(tmp_path, arms=arms, baseline="base", predictions=[], settings=[], budgets=budgets)
    assert read(path).arms[1].overrides == ["trainer.max_steps=100", "beta=0.2"]
    assert read(path, "quick").arms[1].overrides == ["trainer.max_steps=8", "beta=0.2"]
    arms[1]["axes"] = {"trainer.max_steps": 100}
    path = written(tmp_path, arms=arms, baseline="base", predictions=[], settings=[], budgets=budgets)
    with pytest.raises(StudyError, match="budgets.quick.settings: trainer.max_steps is an axis of arm 'long'"):
        read(path, "quick")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quesion": "?"}, "unknown key 'quesion': did you mean 'question'?"),
        ({"baseline": "none"}, "baseline=none: no such arm; type one of beta=0.1, beta=1, flips"),
        ({"arms": [{"overrides": ["beta=1"]}]}, "arms: one has neither a name nor a sweep"),
        ({"arms": [{"sweep": {"beta": ["much"]}}]}, "arms: sweep of beta: needs numbers"),
        ({"arms": [{"sweep": {"beta": [1, 1]}}]}, "arms: two have the name beta=1"),
        (
            {"predictions": [PREDICTION | {"treatment": "beta=2"}]},
            r"predictions\[0\].treatment=beta=2: no such arm or group",
        ),
        ({"predictions": [PREDICTION | {"metric": "a + b"}]}, "metric=a . b: type one name of run.json, or two"),
        ({"predictions": [PREDICTION | {"direction": "up"}]}, "must be one of more, less, same"),
        ({"predictions": [PREDICTION | {"direction": "same", "min_effect": 0}]}, "needs min_effect"),
        ({"predictions": [PREDICTION | {"min_effect": -1}]}, "min_effect 0 or more"),
        ({"budgets": {"quick": {"seeds": [0]}}}, "budget=full: the study has no such budget; type budget=quick"),
        ({"budgets": {"full": {"seeds": [0, 0]}}}, r"seeds=\[0, 0\]: need at least one, each once"),
        ({"budgets": {"full": {"seeds": [0], "arms": ["x"]}}}, "budgets.full.arms: no arm or group is called 'x'"),
        ({"title": None}, "title"),
        ({"found": "Much."}, "found: renamed; type notes: in its place"),
        ({"predictions": [PREDICTION | {"says": "it is"}]}, r"predictions\[0\].says: renamed; type description:"),
        ({"arms": [{"name": "a", "at": {"beta": 1}}]}, r"arms\[0\].at: renamed; type axes: in its place"),
        ({"budgets": {"full": {"seeds": [0], "found": "x"}}}, "budgets.full.found: renamed; type notes:"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(StudyError, match=message) as error:
        read(written(tmp_path, **changes))
    assert "small.yaml: " in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_predicted_is_hashed_and_titles_are_not(tmp_path):
    first = read(written(tmp_path))
    assert read(written(tmp_path, title="Another")).digest() == first.digest()
    assert read(written(tmp_path, notes="Seen: ...")).digest() == first.digest()
    changed = [dict(PREDICTION, min_effect=0.2)]
    assert read(written(tmp_path, predictions=changed)).digest() != first.digest()
    assert read(written(tmp_path), seeds=[5, 6]).digest() != first.digest()


def test_a_changed_prediction_is_registered_beside_the_first(tmp_path):
    def register(**changes: Any) -> list[dict]:
        path = written(tmp_path, **changes)
        one = StudyRun(read(path), path, "full", [], tmp_path, "command")
        one.register()
        return json.loads((one.folder / "study.json").read_text())["registrations"]

    (first,) = register()
    assert register() == [first]
    assert register(title="Another") == [first]
    again = register(predictions=[dict(PREDICTION, direction=Direction.less.value)])
    assert again[0] == first
    assert len(again) == 2


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """A folder in which two studies with an arm in common were run, one of whose jobs failed at first."""
    folder = tmp_path_factory.mktemp("studied")
    written(folder)
    other = [{"sweep": {"beta": [0.1, 5]}}]
    moved = [dict(PREDICTION, treatment="beta=5")]
    written(folder, "other", arms=other, predictions=moved)
    behaves(folder, **{"beta_1/seed_1": "fails"})
    result = study(folder, "study=all", "launcher=local")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "10 jobs" not in result.stdout  # the arm in common is run once
    assert "outputs/studies/runs/full: 8 jobs: 8 new" in result.stdout
    assert (folder / "outputs/studies/other/full/report.html").exists()
    front = (folder / "outputs/studies/index.html").read_text()
    assert 'href="other/full/report.html"' in front
    assert 'href="small/full/report.html"' in front
    return folder


def test_a_study_says_what_became_of_its_jobs(studied):
    small, other = record(studied), record(studied, "other")
    assert small["status"] == "failed"
    assert other["status"] == "done"
    assert [(c["arm"], c["seed"], c["status"]) for c in small["jobs"]] == [
        (arm, seed, "failed" if (arm, seed) == ("beta=1", 1) else "done")
        for seed in (0, 1)
        for arm in ("beta=0.1", "beta=1", "flips")
    ]
    failed = small["jobs"][4]
    assert failed["error"].startswith("ValueError: the loss is not finite")
    home = studied / "outputs/studies/small/full"
    assert (home / failed["log"]).resolve().is_file()
    assert {(home / c["folder"]).resolve() for c in small["jobs"][:1]} == {
        (studied / "outputs/studies/other/full" / c["folder"]).resolve() for c in other["jobs"][:1]
    }
    began = json.loads((home / small["jobs"][0]["folder"] / "run.json").read_text())["started"]
    assert small["registrations"][0]["at"] <= began


def test_the_same_command_runs_what_is_missing_alone(studied, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(studied, folder)
    (folder / "behaviour.json").unlink()
    before = len(starts(folder))
    result = study(folder, "ablations/small.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(starts(folder)) == before + 1
    assert record(folder)["status"] == "done"
    assert record(folder)["registrations"] == record(studied)["registrations"]


def test_a_budget_whose_settings_come_to_those_of_another_runs_nothing_again(studied, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(studied, folder)
    before = len(starts(folder))
    quick = {"seeds": [0], "arms": ["beta=0.1", "beta=1"], "settings": ["optim.lr=3e-4"]}  # the default
    written(folder, budgets={"full": {"seeds": [0, 1]}, "quick": quick})
    result = study(folder, "ablations/small.yaml", "budget=quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "outputs/studies/runs/quick: 2 jobs: 2 done already" in result.stdout
    assert "exploratory" in result.stdout  # they had been run before these predictions were registered
    assert len(starts(folder)) == before
    home = folder / "outputs/studies/small/quick"
    found = [(home / job["folder"]).resolve() for job in record(folder, budget="quick")["jobs"]]
    assert found == [(home.parent / "full" / job["folder"]).resolve() for job in record(folder)["jobs"][:2]]


def test_a_plan_runs_nothing(studied, tmp_path):
    (tmp_path / "new").mkdir()
    written(tmp_path / "new")
    result = study(tmp_path / "new", "ablations/small.yaml", "--plan")
    assert result.returncode == 0, result.stderr
    assert "3 arms x 2 seeds: 6 jobs, 6 new" in result.stdout
    assert "6 of 6 jobs are left to run: the time is unknown until the first job is done" in result.stdout
    assert not (tmp_path / "new" / "outputs" / "studies").exists()


@pytest.mark.extended  # in make test: tests/studies/test_until.py
def test_a_study_that_is_killed_goes_on_where_it_was(tmp_path):
    written(tmp_path)
    behaves(tmp_path, **{"beta_1/seed_0": "waits"})
    command = [sys.executable, "-m", "tests.support.standin_study", "ablations/small.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, start_new_session=True)
    second = tmp_path / "outputs/studies/runs/full/beta=1/seed=0"
    until(lambda: (second / "checkpoints/step-1.ckpt").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert record(tmp_path)["status"] == "running"
    (tmp_path / "behaviour.json").unlink()
    result = study(tmp_path, "ablations/small.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 jobs: 1 done already, 1 to be resumed, 4 new" in result.stdout
    assert record(tmp_path)["status"] == "done"


def test_a_study_of_real_runs_ends_in_verdict_and_page(tmp_path):
    arms = [{"sweep": {"beta": [0.1, 1]}}]
    less = {"description": "KL falls with beta", "measure": "difference", "metric": "kl"}
    less |= {"treatment": "beta=1", "control": "beta=0.1"}
    less["direction"] = "less"
    path = written(
        tmp_path, arms=arms, predictions=[less], metrics=["kl", "gold_gain"], budgets={"full": {"seeds": [0]}}
    )
    result = run("dpo_lab.study", tmp_path, str(path.relative_to(tmp_path)), *SMALL_RUN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "KL falls with beta" in result.stdout
    assert "inconclusive" in result.stdout  # one seed tells no spread
    (page,) = tmp_path.glob("outputs/studies/small/*/report.html")
    assert "one seed" in page.read_text()
    done = [json.loads(each.read_text()) for each in tmp_path.glob("outputs/studies/runs/full/*/seed=0/run.json")]
    assert {each["config"]["beta"] for each in done} == {0.1, 1}
    assert {each["status"] for each in done} == {"done"}


@pytest.mark.extended
def test_a_study_of_real_runs_is_killed_goes_on_and_ends_when_decided_or_out_of_seeds(tmp_path):
    arms = [{"sweep": {"beta": [0.1, 5]}}]
    less = {"description": "KL falls with beta", "measure": "difference", "metric": "kl", "direction": "less"}
    less |= {"treatment": "beta=5", "control": "beta=0.1"}
    budgets = {"full": {"seeds": [3]}}
    path = written(tmp_path, arms=arms, predictions=[less], metrics=["kl", "gold_gain"], budgets=budgets)
    typed = [str(path.relative_to(tmp_path)), "until=decided", "max_seeds=5", *SMALL_RUN]
    command = [sys.executable, "-m", "dpo_lab.study", *typed]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, start_new_session=True)
    runs = tmp_path / "outputs/studies/runs/full"
    until(lambda: len([*runs.glob("*/seed=4/run.json")]) == 2, seconds=400)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (told,) = (json.loads(each.read_text()) for each in tmp_path.glob("outputs/studies/small/*/study.json"))
    assert told["stopping"] == {"until": "decided", "max_seeds": 5, "seeds": [3], "all_arms": 5}
    assert [look["seeds"] for look in told["looks"]] == [1]
    done = {each: each.read_bytes() for each in runs.glob("*/seed=*/run.json") if '"done"' in each.read_text()}
    assert len(done) >= 3
    result = run("dpo_lab.study", tmp_path, *typed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(each.read_bytes() == before for each, before in done.items())
    (told,) = (json.loads(each.read_text()) for each in tmp_path.glob("outputs/studies/small/*/study.json"))
    seeds = told["study"]["seeds"]
    assert seeds == list(range(3, 3 + len(seeds)))
    assert [look["seeds"] for look in told["looks"]] == list(range(1, len(seeds) + 1))
    words = [look["predictions"][0]["verdict"] for look in told["looks"]]
    assert "inconclusive" not in words[-1:] or len(seeds) == 5
    assert set(words[:-1]) <= {"inconclusive"}
    (page,) = tmp_path.glob("outputs/studies/small/*/report.html")
    assert "exploratory" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablations/none.yaml"], "ablations/none.yaml: no such file; type ablations/small.yaml"),
        (["smal.yaml"], "smal.yaml: no such file; type ablations/small.yaml"),
        ([], "which study? type python -m dpo_lab.study ablations/small.yaml"),
        (["study=some"], "study=some: type study=all, or the path of a study file"),
        (["ablations/small.yaml", "seeds=a"], "seeds=a: must be whole numbers; type e.g. seeds=0,1,2"),
        (["ablations/small.yaml", "until=now"], "until=now: type until=decided, or leave it out for the seeds of the"),
        (["ablations/small.yaml", "max_seeds=9"], "max_seeds=9: goes with until=decided"),
        (["ablations/small.yaml", "until=decided", "max_seeds=4"], "max_seeds=4: must be a whole number, 5 or more"),
        (
            ["ablations/small.yaml", "until=decided", "max_seeds=all"],
            "max_seeds=all: must be a whole number, 5 or more",
        ),
        (["ablations/small.yaml", "optim.lr=1e-4,1e-3"], "has several values; type them as its sweep"),
        (["ablations/small.yaml", "beta=much"], "beta=much: must be a number"),
    ],
)
def test_refused_by_the_command(arguments, message, tmp_path):
    written(tmp_path)
    (tmp_path / ".hooks.yaml").touch()  # no study
    result = study(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs" / "studies").exists()
