"""Seeds without an effect are outcomes, and verdicts of studies that add seeds are valid at every look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dpo_lab.stats.paired_tests import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict
from dpo_lab.studies import sequential, verdicts
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.scales import Scale
from dpo_lab.studies.spec import Arm, Direction, Measure, Missing, Prediction, StudyError
from dpo_lab.sweeps.study_file import read
from tests.conftest import REPOSITORY
from tests.support import a_study

UNTIL = {"stopping": {"until": "decided", "max_seeds": 24}}
WOBBLE = (-0.02, 0.01, 0.0, 0.02, -0.01, 0.015, -0.005, 0.01, -0.015, 0.005, 0.0, 0.02)


def judged(
    rule: Missing,
    failed: tuple[int, ...],
    effect: float = 1.0,
    seeds: int = 12,
    status: str = "failed",
    more: Mapping = {},
    **settings,
) -> Verdict:
    """An arm whose effect is there in every seed but those that failed."""
    study = a_study.study(["base", "arm"], [a_study.predicts("arm", **settings)], seeds, rule)

    def values(arm: Arm, seed: int) -> Mapping[str, float] | RunData:
        if arm.name == "arm" and seed in failed:
            return RunData(Path("x"), "arm", seed, status, "ValueError: no")
        return {"gold_gain": 1.0 + (effect * (1 + WOBBLE[seed])) * (arm.name == "arm")}

    ((_, verdict),) = verdicts.decide(a_study.measured(study, values, **more))
    return verdict


def test_one_failed_seed_of_twelve_changes_nothing_and_is_told():
    verdict = judged(Missing.bounds, (4,))
    assert verdict.word == SUPPORTED
    assert verdict.effect is not None
    assert verdict.effect.value == pytest.approx(1.0, abs=0.01)  # of the seeds that have one
    assert verdict.effect.interval is not None
    assert verdict.effect.interval[0] < 0.5 < 1.0 < verdict.effect.interval[1]  # but not as narrow as theirs
    assert verdict.seeds == [seed for seed in range(12) if seed != 4]
    assert verdict.note == "1 of 12 seeds missing (bounds): supported however they count"


def test_a_verdict_that_hangs_on_missing_seeds_is_inconclusive_and_says_what_it_would_be():
    assert judged(Missing.left_out, (0, 4, 7, 9)).word == SUPPORTED
    verdict = judged(Missing.bounds, (0, 4, 7, 9))
    assert verdict.word == INCONCLUSIVE
    assert "4 of 12 seeds missing (bounds): supported without them, inconclusive with them against" in verdict.note
    worst = judged(Missing.worst, (0, 4, 7, 9))
    assert worst.word == INCONCLUSIVE
    assert worst.effect is not None
    assert worst.effect.value == pytest.approx((8 - 4 * 1.02) / 12, abs=0.01)  # averaged with, not away
    assert "supported without them" in worst.note


def test_the_side_of_a_missing_seed_follows_the_prediction():
    less = {"direction": Direction.less, "effect": -1.0}
    assert judged(Missing.worst, (4,), **less).effect.value == pytest.approx(-10 / 12, abs=0.01)  # pyright: ignore
    same = {"direction": Direction.same, "min_effect": 0.5, "effect": 0.01}
    assert judged(Missing.bounds, (), **same).word == SUPPORTED
    verdict = judged(Missing.bounds, (4, 5, 6, 7), **same)
    assert verdict.word == SUPPORTED or "inconclusive with them" in verdict.note
    assert judged(Missing.bounds, (4, 5, 6, 7, 8), **same).word == INCONCLUSIVE
    assert judged(Missing.bounds, (4,), effect=-1.0).word == NOT_SUPPORTED


def test_half_of_the_seeds_and_more_missing_decide_nothing():
    assert judged(Missing.left_out, tuple(range(6))).word == INCONCLUSIVE
    assert judged(Missing.left_out, tuple(range(5))).word == SUPPORTED
    assert judged(Missing.bounds, tuple(range(7))).word == INCONCLUSIVE
    assert judged(Missing.worst, tuple(range(12))).note == "not measured; 12 of 12 seeds missing"


NOISE = tuple(20 * wobble for wobble in WOBBLE)


def of_two(rule: Missing, status: str, first: float, missing: tuple[int, ...], more: Mapping = {}) -> list[Verdict]:
    """The verdicts on two arms: of one all seeds are done, of the other some are not."""
    study = a_study.study(
        ["base", "first", "second"], [a_study.predicts("first"), a_study.predicts("second")], 12, rule
    )

    def values(arm: Arm, seed: int) -> Mapping[str, float] | RunData:
        if arm.name == "second" and seed in missing:
            return RunData(Path("x"), "second", seed, status, "ValueError: no")
        return {"gold_gain": {"base": 0.0, "first": first + NOISE[seed], "second": 1 + NOISE[seed]}[arm.name]}

    return [verdict for _, verdict in verdicts.decide(a_study.measured(study, values, **more))]


@pytest.mark.parametrize(("rule", "factor"), [(Missing.left_out, 1), (Missing.worst, 2), (Missing.bounds, 2)])
def test_the_p_of_a_claim_is_corrected_with_those_of_claims_that_have_missing_seeds(rule, factor):
    """Without its missing seeds the second claim has the smaller p; counted against it, it has the larger one."""
    first, second = of_two(rule, "failed", 0.25, (0, 1, 2, 3))
    assert first.p is not None
    assert second.p is not None
    assert first.p_holm == pytest.approx(factor * first.p)
    assert first.note == ""


def test_an_arm_that_failed_makes_no_other_claim_easier():
    first, second = of_two(Missing.left_out, "failed", 0.25, tuple(range(12)))
    assert second.note.startswith("not measured")
    assert second.p_holm is None
    assert first.p is not None
    assert first.p_holm == pytest.approx(2 * first.p)


def test_with_fixed_seeds_no_claim_is_decided_before_all_runs_have_ended():
    assert of_two(Missing.bounds, "running", 1.0, (11,))[0].word == INCONCLUSIVE
    assert of_two(Missing.bounds, "running", 1.0, ())[0].word == SUPPORTED
    assert of_two(Missing.bounds, "running", 1.0, (11,), UNTIL)[0].word == SUPPORTED


def test_differences_of_arms_are_valid_at_every_look_where_seeds_are_added():
    study = a_study.study(["base", "arm"], seeds=12)
    runs = a_study.measured(study, lambda arm, seed: {"gold_gain": (1 + NOISE[seed]) * (arm.name == "arm")}, **UNTIL)
    found, effects = verdicts.versus_baseline(runs, "gold_gain")["arm"], [1 + noise for noise in NOISE]
    assert found.difference is not None
    assert found.difference.interval == pytest.approx(sequential.confidence_sequence(effects))
    assert found.p == pytest.approx(sequential.p_value(effects))


def test_no_missing_seed_no_note_whatever_the_rule():
    assert judged(Missing.bounds, ()) == judged(Missing.worst, ()) == judged(Missing.left_out, ())
    assert judged(Missing.bounds, ()).interval_kind == "t, fixed seeds"


def test_a_study_that_adds_seeds_has_anytime_valid_intervals():
    verdict = judged(Missing.bounds, (), seeds=6, more=UNTIL)
    effects = [1 + wobble for wobble in WOBBLE[:6]]
    assert verdict.interval_kind == "anytime-valid"
    assert verdict.word == SUPPORTED
    assert verdict.p == pytest.approx(sequential.p_value(effects, 0.0))
    assert verdict.effect is not None
    assert verdict.effect.interval == pytest.approx(sequential.confidence_sequence(effects))
    assert verdict.detectable is None
    few = judged(Missing.bounds, (), seeds=4, more=UNTIL)
    assert few.word == INCONCLUSIVE
    assert few.effect is not None
    assert few.effect.interval is None


def test_a_seed_that_still_runs_ends_what_is_looked_at():
    """Else seeds that end early, as a collapsed policy's short samples may, would be looked at first."""
    verdict = judged(Missing.bounds, (8,), more=UNTIL, status="running")
    assert verdict.word == SUPPORTED
    assert verdict.seeds == list(range(8))
    assert verdict.note == ""
    fixed = judged(Missing.bounds, (8,), status="running")
    assert (fixed.word, fixed.note) == (INCONCLUSIVE, "1 of 12 seeds not finished")


def test_a_failed_seed_is_an_outcome_at_every_look():
    verdict = judged(Missing.bounds, (1,), more=UNTIL)
    assert "1 of 12 seeds missing (bounds): supported however they count" in verdict.note
    (bad,) = {judged(Missing.worst, (0, 1, 2, 3, 4), more=UNTIL).word}
    assert bad == INCONCLUSIVE


def yes_no(found: int, seeds: int, direction: Direction, more: Mapping) -> Verdict:
    finding = {"name": "too easy", "severity": "warning", "message": "", "threshold": "", "suggestion": ""}
    level = Prediction("x", Measure.level, "base", direction, "health/too_easy", value=0.5)
    study = a_study.study(["base"], [level], seeds)
    runs: RunSet = a_study.measured(
        study, lambda arm, seed: a_study.run(arm.name, seed, {}, health=[finding] * (seed < found)), **more
    )
    ((_, verdict),) = verdicts.decide(runs)
    return verdict


def test_what_occurs_or_does_not_is_anytime_valid_too():
    assert yes_no(6, 6, Direction.more, UNTIL).word == INCONCLUSIVE  # e = 14.4
    verdict = yes_no(7, 7, Direction.more, UNTIL)
    assert (verdict.word, verdict.interval_kind) == (SUPPORTED, "anytime-valid")
    assert verdict.effect is not None
    assert verdict.effect.interval is not None
    assert verdict.effect.interval[1] == 0.5
    assert yes_no(0, 7, Direction.less, UNTIL).word == SUPPORTED
    assert yes_no(7, 7, Direction.more, {}).interval_kind == "exact binomial, fixed seeds"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_sequence_of_shares_covers_the_truth_at_every_look_at_once(share: float):
    draws = np.random.default_rng(8).random((2000, 40)) < share
    logs = np.array([sequential.share_log_e_values(each, share) for each in draws])
    assert (logs < np.log(20)).all(1).mean() >= 0.95
    low, high = sequential.share_confidence_sequence(draws[0])
    assert 0 <= low < draws[0].mean() < high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert sequential.share_log_e_values(draws[0], end)[-1] == pytest.approx(np.log(20), abs=1e-6)


def test_the_summary_says_which_of_a_studys_claims_hold():
    def text(*words: tuple[str, bool]) -> str:
        return verdicts.claims_text(
            [(a_study.predicts("x", primary=primary), Verdict(word)) for word, primary in words]
        )

    assert text((SUPPORTED, True), (SUPPORTED, True), (NOT_SUPPORTED, False)) == "2 of 2 claims supported"
    assert text(*[(SUPPORTED, True)] * 4, (INCONCLUSIVE, True)) == "4 of 5 claims supported, 1 inconclusive"
    assert text((NOT_SUPPORTED, True)) == "0 of 1 claim supported, 1 not supported"
    assert text((SUPPORTED, False)) == "no claim"


def test_a_study_file_states_rule_and_scale_and_may_not_leave_failed_runs_out(tmp_path: Path):
    text = (REPOSITORY / "ablations/beta.yaml").read_text()
    path = tmp_path / "beta.yaml"
    path.write_text(text)
    bounds = read(path)
    assert (bounds.missing, bounds.known[:10]) == (Missing.bounds, "Five seeds")
    assert {each.scale for each in bounds.predictions} == {Scale.plain, Scale.log, Scale.log_odds}
    path.write_text(text + "missing: worst\n")
    assert read(path).missing is Missing.worst
    assert read(path).digest() != bounds.digest()
    path.write_text(text + "missing: left_out\n")
    with pytest.raises(
        StudyError, match=r"missing=left_out: hides failed runs; type missing: bounds or missing: worst"
    ):
        read(path)
