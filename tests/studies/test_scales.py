"""Effects on the scale of their metric: factors for ratio quantities, odds for shares, intervals inside what can be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_lab.reporting import comparison
from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import SUPPORTED
from dpo_lab.studies import archive, verdicts
from dpo_lab.studies.effects import interpolate_at
from dpo_lab.studies.scales import Kind, Scale, as_told, axis_of, default_scale, kind_of, mean_over_seeds, on_scale
from dpo_lab.studies.spec import Arm, Direction, Measure, Prediction, StudyError
from tests.conftest import REPOSITORY
from tests.support import a_study

KEPT = {  # KL of five seeds by beta: the record of 2026-11-28 of ablations/beta.yaml, clean labels
    0.1: (1.617, 1.953, 2.503, 2.22, 3.92),
    0.01: (10.336, 11.208, 3.341, 40.014, 5.236),
    0.05: (1.968, 4.052, 2.723, 2.861, 2.78),
    0.5: (0.841, 1.088, 1.192, 1.019, 1.037),
    1.0: (0.563, 0.578, 0.687, 0.64, 0.603),
    5.0: (0.182, 0.131, 0.132, 0.219, 0.136),
}
KLS = (0.5, 1.0, 4.0, 30.0, 2.0)  # of seeds of an arm, in nats


@pytest.mark.parametrize(
    ("metric", "kind", "scale"),
    [
        ("kl", Kind.ratio, Scale.log),
        ("initial/perplexity", Kind.ratio, Scale.log),
        ("perplexity / initial/perplexity", Kind.ratio, Scale.log),
        ("seconds/dpo", Kind.ratio, Scale.log),
        ("memory/weights", Kind.ratio, Scale.log),
        ("kl / gold_gain", Kind.plain, Scale.plain),  # a gain may be below 0
        ("kl - initial/length", Kind.plain, Scale.plain),
        ("kl at gold_gain 0.9", Kind.ratio, Scale.log),
        ("gold_gain", Kind.plain, Scale.plain),
        ("margin", Kind.plain, Scale.plain),
        ("train/flipped/accuracy", Kind.share, Scale.plain),
        ("train/flipped/accuracy - true_accuracy", Kind.plain, Scale.plain),
        ("health/too_easy", Kind.share, Scale.plain),
    ],
)
def test_a_metric_states_what_sort_of_number_it_is(metric: str, kind: Kind, scale: Scale):
    assert (kind_of(metric), default_scale(metric)) == (kind, scale)


def test_all_that_runs_measure_has_a_kind_that_its_values_allow():
    for path in sorted((REPOSITORY / "ablations/records").glob("*.json")):
        for run in archive.read(path).runs:
            for name, estimate in run.metrics.items():
                if kind_of(name) is Kind.share:
                    assert 0 <= estimate.value <= 1, (path.stem, name)
                elif kind_of(name) is Kind.ratio:
                    assert estimate.value > -0.05, (path.stem, name)  # an estimate of a KL near 0 may be below it


def test_log_odds_are_finite_where_the_number_of_examples_is_known():
    assert on_scale(Scale.log_odds, 0.5) == 0
    assert on_scale(Scale.log_odds, 1.0, 9) == pytest.approx(math.log(9.5 / 0.5))
    assert on_scale(Scale.log_odds, 0.0, 9) == pytest.approx(-math.log(9.5 / 0.5))
    for scale, value in ((Scale.log_odds, 1.0), (Scale.log, 0.0), (Scale.log, -0.01)):
        with pytest.raises(ValueError, match="has no .*log.*; state scale: plain"):
            on_scale(scale, value)


def slopes(factor: float) -> tuple[Prediction, verdicts.Verdict]:
    """KL that falls by a factor a decade of beta, from another height in each seed."""
    arms = ["base", *(Arm(f"beta {beta}", [], "dpo", {"beta": beta}) for beta in (0.01, 0.1, 1.0))]
    predicted = a_study.predicts(
        "dpo", "kl", measure=Measure.slope, axis="beta", direction=Direction.less, min_effect=1.25
    )
    wobble = (1.05, 0.97, 1.0, 1.02, 0.96)
    ((_, verdict),) = verdicts.decide(
        a_study.measured(
            a_study.study(arms, [predicted]),
            lambda arm, seed: {"kl": KLS[seed] * (factor * wobble[seed]) ** math.log10(arm.axes.get("beta", 1.0))},
        )
    )
    return predicted, verdict


def test_a_slope_of_kl_is_a_factor_a_decade_whatever_the_height_of_each_seed():
    predicted, verdict = slopes(0.3)
    assert verdict.word == SUPPORTED
    assert verdict.effect is not None
    told = as_told(Scale.log, verdict.effect)
    assert told.value == pytest.approx(0.3, abs=0.001)
    assert told.interval is not None
    assert 0 < told.interval[0] < 0.3 < told.interval[1] < 0.8
    text = comparison.effect_text(verdict.effect, predicted.scale)
    assert text.startswith("x 0.300 (0.2")
    assert comparison.predicted(predicted) == "below x 1; smallest relevant effect x 0.8"
    assert slopes(0.85)[1].word != SUPPORTED  # it falls, by less than what would matter


def test_kl_against_beta_in_the_kept_record_is_decided_by_its_logarithm():
    """p is .08 in nats, .0001 in logarithms: a factor of .24 a decade."""
    arms = [Arm(f"beta {beta}", [], "clean", {"beta": beta}) for beta in KEPT]
    runs = a_study.measured(a_study.study(arms), lambda arm, seed: {"kl": KEPT[arm.axes["beta"]][seed]})
    nats, logs = (
        Prediction("falls", Measure.slope, "clean", Direction.less, "kl", axis="beta", scale=scale)
        for scale in (Scale.plain, Scale.log)
    )
    in_nats, in_logs = (list(verdicts.effect_per_seed(each, runs)[0].values()) for each in (nats, logs))
    assert paired_tests.p_value(in_nats) == pytest.approx(0.08, abs=0.005)
    assert [each / math.log(10) for each in in_logs] == pytest.approx([-0.60, -0.69, -0.51, -0.76, -0.59], abs=0.006)
    assert paired_tests.p_value(in_logs) == pytest.approx(0.0001, abs=0.00006)
    told = as_told(Scale.log, paired_tests.paired(in_logs))
    assert told.value == pytest.approx(0.24, abs=0.005)
    assert told.interval == pytest.approx((0.18, 0.31), abs=0.005)


def test_a_group_is_its_geometric_mean_and_a_value_at_equal_gain_lies_between_in_logs():
    arms = ["base", Arm("mild", [], "dpo"), Arm("strong", [], "dpo")]
    numbers = {"base": (0.0, 2.0), "mild": (0.2, 1.0), "strong": (1.0, 100.0)}
    predictions = [
        a_study.predicts("dpo", "kl"),
        a_study.predicts("mild", "kl", measure=Measure.level, value=4.0, direction=Direction.less),
    ]
    runs = a_study.measured(
        a_study.study(arms, predictions),
        lambda arm, seed: {"gold_gain": numbers[arm.name][0], "kl": numbers[arm.name][1]},
    )
    difference, level = (verdicts.effect_per_seed(each, runs)[0][0] for each in predictions)
    assert difference == pytest.approx(math.log(10 / 2))
    assert level == pytest.approx(math.log(1 / 4))
    matched = a_study.predicts("dpo", "kl", control="dpo", matched_on={"gold_gain": 0.6})
    assert interpolate_at(runs, "dpo", "kl", "gold_gain", 0.6, 0, matched.scale) == pytest.approx(math.log(10))
    assert interpolate_at(runs, "dpo", "kl", "gold_gain", 0.6, 0) == pytest.approx(50.5)


def test_a_value_without_a_logarithm_is_missing_and_says_so():
    prediction = a_study.predicts("arm", "kl")
    runs = a_study.measured(
        a_study.study(["base", "arm"], [prediction]), lambda arm, seed: {"kl": 1.0 + seed if seed else -0.002}
    )
    effects, missing = verdicts.effect_per_seed(prediction, runs)
    assert sorted(effects) == [1, 2, 3, 4]
    assert missing == {0: "arm, seed 0: kl -0.002 has no logarithm; state scale: plain"}


def test_a_prediction_states_its_scale_and_a_factor_for_what_would_matter():
    assert a_study.predicts("a", "kl").scale is Scale.log
    assert a_study.predicts("a", "kl", scale=Scale.plain).least == 0
    assert a_study.predicts("a", "kl", min_effect=2.0).least == pytest.approx(math.log(2))
    assert a_study.predicts("a", "kl", measure=Measure.level).scale is Scale.plain  # above 0: no logarithm
    with pytest.raises(StudyError, match=r"min_effect=0.2: on the log scale it is a factor above 1, such as 1.25"):
        a_study.predicts("a", "kl", min_effect=0.2)
    with pytest.raises(StudyError, match=r"value=0 has no logarithm"):
        a_study.predicts("a", "kl", measure=Measure.level, scale=Scale.log)
    with pytest.raises(StudyError, match=r"scale=log: an area is a share"):
        Prediction("x", Measure.area, "a", Direction.more, scale=Scale.log)
    plain = a_study.study(["base", "a"], [a_study.predicts("a", "kl", scale=Scale.plain)])
    assert plain.digest() != a_study.study(["base", "a"], [a_study.predicts("a", "kl")]).digest()


def test_means_over_seeds_stay_within_what_the_metric_can_be():
    kl = mean_over_seeds("kl", KLS)
    assert kl.value == pytest.approx(float(np.exp(np.log(KLS).mean())))
    assert kl.interval is not None
    assert 0 < kl.interval[0] < kl.value < kl.interval[1]
    naive = paired_tests.paired(KLS).interval
    assert naive is not None
    assert naive[0] < 0  # what it was before
    assert mean_over_seeds("kl", [0.02, -0.01, 0.03]).interval == pytest.approx((0.0, 0.0651), abs=1e-3)
    share = mean_over_seeds("well_formed", [0.0, 0.9, 0.05])
    assert share.interval is not None
    assert share.interval[0] == 0.0
    assert share.interval[1] == 1.0
    assert mean_over_seeds("gold_gain", [1.0, -1.0]).interval == paired_tests.paired([1.0, -1.0]).interval


def test_arms_are_compared_by_factors_where_the_metric_is_a_ratio():
    runs = a_study.measured(
        a_study.study(["base", "arm"]), lambda arm, seed: {"kl": KLS[seed] * (1.0 if arm.name == "base" else 2.0 + seed / 50)}
    )  # fmt: skip
    found = verdicts.versus_baseline(runs, "kl")["arm"]
    assert found.scale is Scale.log
    assert found.difference is not None
    assert found.difference.value == pytest.approx(2.04, abs=0.001)
    (_, arm) = comparison.figures(runs, ["kl"])["kl"]
    assert comparison.difference_text(arm).startswith("x 2.04")


def test_factors_of_any_size_are_told():
    assert as_told(Scale.log, Estimate(5000.0)).value == pytest.approx(1e300)
    assert axis_of("kl", [0.1, 3.0]) == "log"
    assert axis_of("kl", [0.1, -0.01]) == axis_of("gold_gain", [1.0]) == axis_of("kl", []) == "linear"
