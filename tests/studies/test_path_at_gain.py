"""A metric at an equal gain along a run's own trajectory: worked numbers, and runs that never come to that gain."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies import archive, effects
from dpo_lab.studies.path_at_gain import Crossing, crossing
from dpo_lab.studies.run_data import Censored, NotMeasured, RunData, RunSet
from dpo_lab.studies.spec import Arm, Direction, Measure, Prediction, Study, StudyError

AT = "kl at gold_gain 0.9"


def path(*points: tuple[float, float]) -> list[dict[str, float]]:
    """Points of gain and KL, 20 steps apart."""
    return [{"step": 20 * n, "gold_gain": gain, "kl": kl} for n, (gain, kl) in enumerate(points)]


@pytest.mark.parametrize(
    ("points", "step", "kl"),
    [
        ([(0, 0), (0.6, 1), (1.2, 4)], 30, 2.5),  # half of the second way
        ([(0, 0), (0.9, 1.5), (1.2, 4)], 20, 1.5),  # at a point
        ([(0, 0), (1.0, 2), (0.5, 3), (1.5, 9)], 18, 1.8),  # it loses its gain again, and comes back: the first time
        ([(0, 0), (0.6, 1), (0.4, 2), (1.4, 7)], 50, 4.5),  # not before it is there, whatever it lost on the way
        ([(0.9, 0.1), (1.2, 4)], 0, 0.1),
        ([(1.2, 3.0), (0.6, 1.0)], 10, 2.0),  # from above
    ],
)
def test_worked_numbers(points, step, kl):
    found = crossing(path(*points), "kl", "gold_gain", 0.9)
    assert found is not None
    assert (found.step, found.metric) == pytest.approx((step, kl))
    assert not found.is_censored


def test_nothing_is_extrapolated():
    found = crossing(path((0, 0), (0.5, 1), (0.8, 2), (0.7, 3)), "kl", "gold_gain", 0.9)
    assert found == Crossing(40, 2, closest=0.8)
    assert found is not None
    assert found.is_censored


def test_points_without_a_metric_are_left_out():
    points = path((0, 0), (0.6, 1), (1.2, 4))
    del points[1]["kl"]
    assert crossing(points, "kl", "gold_gain", 0.9) == Crossing(30, 3)
    assert crossing(points, "kl", "judge_gain", 0.9) is None
    assert crossing([], "kl", "gold_gain", 0.9) is None


def run_of(arm: str, seed: int, *points: tuple[float, float], status: str = "done") -> RunData:
    record = {"trajectory": path(*points)} if points else {}
    return RunData(Path("nowhere"), arm, seed, status, record=record, metrics={"kl": Estimate(1.0, n=1)})


def test_a_run_says_its_value_or_how_close_it_came():
    assert run_of("a", 0, (0, 0), (1.8, 4)).value(AT) == 2
    with pytest.raises(Censored, match=r"a, seed 0: never came to gold_gain 0.9; closest 0.5 at step 20, with kl 4"):
        run_of("a", 0, (0, 0), (0.5, 4), (0.3, 5)).value(AT)
    with pytest.raises(NotMeasured, match=r"no trajectory of kl and gold_gain \(evals.every is 0\)"):
        run_of("a", 0).value(AT)
    with pytest.raises(NotMeasured, match="status failed"):
        run_of("a", 0, (0, 0), (1.8, 4), status="failed").value(AT)


def compared(tmp_path: Path) -> RunSet:
    arms = [Arm("with"), Arm("without")]
    prediction = Prediction("costs more", Measure.difference, "without", Direction.more, AT, "with")
    study = Study("s", "t", "q?", "c", "here", [prediction], arms, "with", [0, 1, 2], ["kl", AT])
    ends = {("with", 0): 4, ("with", 1): 2, ("with", 2): 3, ("without", 0): 8, ("without", 1): 6}
    runs = [run_of(arm, seed, (0, 0), (1.8, kl)) for (arm, seed), kl in ends.items()]
    return RunSet("t", tmp_path, arms, [0, 1, 2], [*runs, run_of("without", 2, (0, 0), (0.4, 5))], "with", study)


def test_a_prediction_compares_runs_where_each_came_to_the_gain(tmp_path):
    """A seed that never did is missing with its reason, and is counted as that."""
    runs = compared(tmp_path)
    assert runs.study is not None
    found, missing = effects.effect_per_seed(runs.study.predictions[0], runs)
    assert found == {0: pytest.approx(math.log(4 / 2)), 1: pytest.approx(math.log(3 / 1))}  # KL is compared by factors
    assert missing.keys() == {2}
    assert "never came to gold_gain 0.9; closest 0.4" in missing[2]
    assert runs.values("with", AT) == {0: pytest.approx(2), 1: pytest.approx(1), 2: pytest.approx(1.5)}


def test_an_archived_study_gives_the_same_values(tmp_path):
    runs = compared(tmp_path)
    read = archive.read(archive.write(runs, tmp_path))
    assert read.study is not None
    for each in (0, 1):
        assert (
            effects.effect_per_seed(read.study.predictions[0], read)[each]
            == effects.effect_per_seed(read.study.predictions[0], runs)[each]
        )


@pytest.mark.parametrize("metric", ["kl at gold_gain", "kl at gold_gain much", "at gold_gain 0.9 0.8"])
def test_what_can_not_be_read_is_refused(metric):
    with pytest.raises(StudyError, match="or kl at gold_gain 0.9"):
        Prediction("p", Measure.level, "a", Direction.more, metric)
    with pytest.raises(NotMeasured):
        run_of("a", 0, (0, 0), (1.8, 4)).value(metric)


def test_values_may_be_written_as_numbers_are():
    run = run_of("a", 0, (0, 0), (1.8, 4))
    assert math.isclose(run.value("kl at gold_gain 9e-1"), 2)
    assert run.value("gold_gain at kl 4") == 1.8
