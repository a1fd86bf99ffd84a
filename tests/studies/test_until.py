"""Studies that add seeds until they are decided: which seeds, when they end, what they record, and no run twice."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from dpo_lab.reporting.figures.looks import looks_figure
from dpo_lab.runs.run_record import RunRefused
from dpo_lab.studies import archive
from dpo_lab.studies.load import gather
from dpo_lab.studies.spec import Direction, StudyError
from dpo_lab.studies.verdicts import decide
from dpo_lab.sweeps import study_run
from dpo_lab.sweeps.job_status import SweepFolder
from tests.support import a_study
from tests.support.fake_sweep import run_studies

LEAST = 0.2


def claims(name: str = "one", **effects: Direction):
    """A study of arms against `base`, which each is predicted to differ from in that direction; seeds 0 and 1 at first."""
    predictions = [a_study.predicts(arm, direction=direction, min_effect=LEAST) for arm, direction in effects.items()]
    return replace(a_study.study(["base", *effects], predictions, seeds=2), name=name, title=name)


def drawn(**means: float):
    """Gains around a mean of the arm, 0 if it has none, with an sd of .3 over seeds."""
    return lambda arm, seed: {
        "gold_gain": means.get(arm, 0.0) + random.Random(f"{arm} {seed}").gauss(0, 0.3),
        "kl": 1.0,
    }


def told(record):
    """What a study's record says, without times."""
    looks = [{**look, "at": ""} for look in record["looks"]]
    return record["study"]["seeds"], record["stopping"], looks, record["status"]


def test_seeds_are_added_until_a_claim_is_decided_and_each_has_a_look(tmp_path, capsys):
    code, (record,), started = run_studies(tmp_path, [claims(strong=Direction.more)], drawn(strong=2.0))
    seeds = record["study"]["seeds"]
    assert code == 0
    assert record["status"] == "done"
    assert 5 <= len(seeds) <= 8
    assert seeds == list(range(len(seeds)))
    assert [look["seeds"] for look in record["looks"]] == list(range(1, len(seeds) + 1))
    words = [look["predictions"][0]["verdict"] for look in record["looks"]]
    assert words == ["inconclusive"] * (len(seeds) - 1) + ["supported"]
    assert record["looks"][-1]["predictions"][0]["e"] >= 20
    assert len(started) == 2 * len(seeds)
    (collection,) = gather([tmp_path])
    assert not collection.is_exploratory
    shown = looks_figure(collection)
    assert shown is not None
    assert [point.x for point in shown.panels[0].series[0].points] == list(range(1, len(seeds) + 1))
    said = capsys.readouterr().out
    assert f"one: {len(seeds)} of at most 24 seeds; decided" in said
    assert "of strong: +" in said


def test_a_command_that_is_refused_changes_no_record(tmp_path):
    """Of another sweep at work; and of fixed seeds, which would drop the looks of a study that adds seeds."""
    study = claims(strong=Direction.more)
    _, (before,), _ = run_studies(tmp_path, [study], drawn(strong=2.0))
    with SweepFolder(tmp_path / "runs").lock(), pytest.raises(RunRefused, match="another sweep is at work here"):
        run_studies(tmp_path, [replace(study, claim="Another.")], drawn(strong=2.0))
    with pytest.raises(StudyError, match="this study adds seeds until it is decided; type until=decided"):
        run_studies(tmp_path, [study], drawn(strong=2.0), max_seeds=None)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("one/*/study.json"))
    assert record == before


def test_what_is_not_there_goes_on_to_the_last_seed_and_is_not_decided_falsely(tmp_path, capsys):
    """Ten claims of an effect that is not there, a look after every seed."""
    arms = {f"arm{number}": Direction.more for number in range(10)}
    _, (record,), _ = run_studies(tmp_path, [claims(**arms)], drawn(), max_seeds=12)
    words = {entry["verdict"] for look in record["looks"] for entry in look["predictions"]}
    assert "supported" not in words
    assert [look["seeds"] for look in record["looks"]] == list(range(1, 13))
    assert "12 of at most 12 seeds; undecided, and no seed is left" in capsys.readouterr().out


def seeds_by_arm(record):
    seeds: dict[str, list[int]] = {}
    for job in record["jobs"]:
        seeds.setdefault(job["arm"], []).append(job["seed"])
    return seeds


def test_arms_stop_once_the_predictions_about_them_are_decided(tmp_path, capsys):
    study = claims(strong=Direction.more, none=Direction.more, explored=Direction.more, secondary=Direction.more)
    *primary, _, secondary = study.predictions
    study = replace(study, predictions=[*primary, replace(secondary, primary=False)])
    _, (record,), started = run_studies(tmp_path, [study], drawn(strong=2.0), max_seeds=12)
    seeds = seeds_by_arm(record)
    over = next(look["seeds"] for look in record["looks"] if look["predictions"][0]["verdict"] == "supported")
    assert 5 <= over < 12
    assert seeds["base"] == seeds["none"] == list(range(12))
    assert seeds["strong"] == list(range(over))
    assert seeds["explored"] == seeds["secondary"] == list(range(5))  # no primary prediction is about them
    assert len(started) == len(record["jobs"]) == 24 + over + 10
    looks = [look["predictions"][0] for look in record["looks"]]
    assert [look["n"] for look in looks] == [*range(1, over + 1), *[over] * (12 - over)]
    assert len({(look["effect"], look["verdict"]) for look in looks[over - 1 :]}) == 1
    assert "5 of at most 12 seeds; 3 of 5 arms go on" in capsys.readouterr().out
    (collection,) = gather([tmp_path / "one"])
    kept = archive.read(archive.write(collection, tmp_path / "records"))
    for runs in (collection, kept):
        assert all(run.is_done for run in runs.runs)  # none is missing
        assert [verdict.word for _, verdict in decide(runs)][:2] == ["supported", "inconclusive"]
        assert [verdict.missing for _, verdict in decide(runs)] == [{}, {}, {}]


@pytest.mark.parametrize("kill_after", [0, 3, 4, 11, 20])
@pytest.mark.parametrize("workers", [1, 7])
def test_a_study_that_is_killed_goes_on_as_if_it_had_not_been(kill_after, workers, tmp_path):
    study, metrics = claims(strong=Direction.more, weak=Direction.less), drawn(strong=2.0, weak=-0.8)
    _, (whole,), every = run_studies(tmp_path / "whole", [study], metrics, workers=workers)
    code, (record,), before = run_studies(tmp_path, [study], metrics, workers=workers, kill_after=kill_after)
    assert code is None
    assert record["status"] == "running"
    rule = {"until": "decided", "max_seeds": 24, "seeds": [0, 1], "all_arms": 5}
    assert record["stopping"] == rule  # before the first run
    _, (record,), after = run_studies(tmp_path, [study], metrics, workers=workers)
    assert told(record) == told(whole)
    assert before + after == every  # nothing was run again
    (collection,) = gather([tmp_path / "one"])
    assert not collection.is_exploratory
    _, (again,), started = run_studies(tmp_path, [study], metrics, workers=workers)
    assert (told(again), started) == (told(whole), [])


def test_a_study_that_is_asked_to_stop_is_not_over_though_its_runs_are_done(tmp_path):
    study, metrics = claims(strong=Direction.more), drawn(strong=2.0)
    _, (whole,), _ = run_studies(tmp_path / "whole", [study], metrics)
    code, (record,), _ = run_studies(tmp_path, [study], metrics, stop_after=4)  # the last run of the second round
    assert code == 128 + signal.SIGTERM
    assert record["status"] == "stopped"
    assert [job["status"] for job in record["jobs"]] == ["done"] * 4
    code, (record,), _ = run_studies(tmp_path, [study], metrics)
    assert (code, told(record)) == (0, told(whole))


def test_studies_that_share_runs_stop_each_by_itself(tmp_path):
    metrics = drawn(strong=2.0)
    studies = [claims("first", strong=Direction.more), claims("second", none=Direction.more)]
    _, (first, second), started = run_studies(tmp_path, studies, metrics, max_seeds=10)
    assert len(first["study"]["seeds"]) < 10
    assert len(second["study"]["seeds"]) == 10
    assert len(set(started)) == len(started) == 10 * 2 + len(first["study"]["seeds"])
    _, (alone,), _ = run_studies(tmp_path / "alone", studies[:1], metrics, max_seeds=10)
    assert told(first) == told(alone)


def test_a_round_gives_every_worker_a_job(tmp_path):
    _, (record,), started = run_studies(tmp_path, [claims(none=Direction.more)], drawn(), max_seeds=7, workers=6)
    assert started[:6] == [f"arm={arm}/{seed}" for seed in (0, 1, 2) for arm in ("base", "none")]
    assert [look["seeds"] for look in record["looks"]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_rule_that_is_changed_after_runs_makes_the_study_exploratory(tmp_path, monkeypatch):
    study = claims(none=Direction.more)
    run_studies(tmp_path, [study], drawn(), max_seeds=6)
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()  # times are in seconds, and runs of this test faster
    monkeypatch.setattr(study_run, "now", lambda: later)
    _, (record,), started = run_studies(tmp_path, [study], drawn(), max_seeds=8)
    assert started == [f"arm={arm}/{seed}" for seed in (6, 7) for arm in ("base", "none")]
    assert len(record["registrations"]) == 2
    (collection,) = gather([tmp_path / "one"])
    assert collection.is_exploratory


def test_a_seed_of_which_no_run_is_done_ends_the_study(tmp_path, capsys):
    def fails(arm: str, seed: int):
        if seed == 3:
            raise ValueError("the loss is not finite")
        return drawn()(arm, seed)

    code, (record,), _ = run_studies(tmp_path, [claims(none=Direction.more)], fails)
    assert code == 1
    assert record["status"] == "failed"
    assert record["study"]["seeds"] == [0, 1, 2, 3]
    assert "no run of seed 3 is done, so no seed is added" in capsys.readouterr().out


def test_an_archived_record_keeps_the_rule_and_says_the_same(tmp_path):
    _, (record,), _ = run_studies(tmp_path, [claims(strong=Direction.more)], drawn(strong=2.0))
    (collection,) = gather([tmp_path / "one"])
    kept = archive.read(archive.write(collection, tmp_path / "records"))
    assert kept.record["stopping"] == record["stopping"]
    assert not kept.is_exploratory
    ((_, ours),), ((_, theirs),) = decide(collection), decide(kept)
    assert (theirs.word, theirs.interval_kind) == (ours.word, ours.interval_kind) == ("supported", "anytime-valid")
    assert theirs.effect is not None
    assert theirs.effect.interval == pytest.approx(ours.effect.interval, rel=1e-4)  # pyright: ignore[reportOptionalMemberAccess]
