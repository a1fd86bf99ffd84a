"""Power before money: how many seeds decide a prediction, from the effects of earlier runs."""

from __future__ import annotations

import random
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo_lab.stats.paired_tests import min_detectable_effect
from dpo_lab.studies import archive
from dpo_lab.studies.effects import effect_per_seed
from dpo_lab.studies.spec import Direction
from dpo_lab.sweeps.study_plan import show_outlook
from dpo_lab.sweeps.study_power import MOST, expected, power
from dpo_lab.sweeps.study_run import StudyRun
from tests.conftest import REPOSITORY
from tests.support import a_study

KEPT = sorted((REPOSITORY / "ablations/records").glob("*.json"))


def effects(mean: float, sd: float = 1.0, n: int = 8) -> list[float]:
    """Of exactly that mean and sd."""
    drawn = np.random.default_rng(1).normal(size=n)
    return list(mean + sd * (drawn - drawn.mean()) / drawn.std(ddof=1))


@pytest.mark.parametrize("n", [5, 10, 20])
def test_a_fixed_number_of_seeds_is_that_of_the_t_test(n):
    found = power(a_study.predicts("a", min_effect=0.01), effects(min_detectable_effect(1.0, n)), 1)
    assert found is not None
    assert found.fixed == pytest.approx(n, abs=1)


def test_looking_after_every_seed_takes_some_more_and_a_strong_effect_few():
    strong, weak = (power(a_study.predicts("a", min_effect=0.1), effects(mean), 1) for mean in (3.0, 0.3))
    assert strong is not None
    assert weak is not None
    seeds, share = expected(strong.ends, 24)
    assert 5 <= seeds < 8
    assert share > 0.99
    assert expected(weak.ends, 24)[1] < 0.5
    assert expected(weak.ends, MOST)[1] > expected(weak.ends, 24)[1]


@pytest.mark.parametrize("direction", list(Direction))
def test_all_directions_are_decided_where_nothing_is_there(direction):
    """A true effect of 0 is decided as one that does not matter, or as the same, if the intervals get small enough."""
    found = power(a_study.predicts("a", direction=direction, min_effect=2.0), effects(0.0), 1)
    assert found is not None
    assert expected(found.ends, 24)[1] > 0.95


def test_one_seed_and_equal_effects_tell_no_power():
    assert power(a_study.predicts("a"), [1.0], 1) is None
    assert power(a_study.predicts("a"), [1.0, 1.0, 1.0], 1) is None


def test_the_strongest_claims_of_the_kept_records_take_fewer_seeds_than_they_had():
    """Of the studies of 8 seeds, as they were designed for a fixed number."""
    needed = {}
    for path in KEPT:
        study = archive.read(path)
        assert study.study is not None
        for prediction in study.study.predictions:
            found = power(prediction, [*effect_per_seed(prediction, study)[0].values()], 5)
            if found is not None and prediction.min_effect and len(study.seeds) == 8:
                needed[study.study.name, prediction.description] = expected(found.ends, 24)
    fewer = {name: seeds for name, (seeds, share) in needed.items() if seeds < 8 and share > 0.95}
    assert len(fewer) >= 2, needed


def test_a_plan_says_from_records_how_many_seeds_decide(tmp_path: Path):
    predictions = [a_study.predicts("strong", min_effect=0.1), a_study.predicts("base", "kl", min_effect=1.1)]
    study = a_study.study(["base", "strong"], predictions)
    seeds = StudyRun(study, tmp_path / "example.yaml", "full", [], tmp_path, "command", 12)

    def told() -> str:
        console = Console(width=200, record=True, file=StringIO())
        show_outlook(console, [], [(seeds, [])])
        return console.export_text()

    assert "No earlier runs of two seeds" in told()
    gain = {"base": 0.0, "strong": 1.0}
    runs = a_study.measured(
        study,
        lambda arm, seed: {"gold_gain": gain[arm.name] + random.Random(f"{arm.name}{seed}").gauss(0, 0.1), "kl": 1.0},
    )
    archive.write(replace(runs, record={**runs.record, "budget": "full"}), tmp_path / "records")
    lines = told().splitlines()
    (row,) = [line for line in lines if line.startswith("of strong")]
    assert row.split()[-2:] == ["100", "%"]
    assert [line for line in lines if line.startswith("of base") and "unknown" in line]
    (whole,) = [
        line for line in lines if line.startswith("All primary predictions, 1 without earlier effects left out")
    ]
    assert "at most 12 seeds (8 min 00 s of CPU time), all decided in 100 %." in whole  # two arms of 20 s, 12 seeds
