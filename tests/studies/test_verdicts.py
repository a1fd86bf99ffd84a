"""From runs to verdicts: what counts as supported, what does not, and what keeps a verdict open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_lab.stats import paired_tests
from dpo_lab.stats.paired_tests import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict
from dpo_lab.studies import frontier, verdicts
from dpo_lab.studies.effects import interpolate_at
from dpo_lab.studies.run_data import NotMeasured, RunData
from dpo_lab.studies.scales import Scale
from dpo_lab.studies.spec import Arm, Direction, Measure, Missing, Prediction, StudyError
from tests.support import a_study

NOISE = (-0.02, 0.01, 0.0, 0.02, -0.01)  # of the seeds; sd .0158
HALF = 2.7764 * 0.0158114 / math.sqrt(5)  # of the 95 % interval: .0196


def judged(effect: float, **settings) -> Verdict:
    """The verdict on an arm that has this effect in the mean of five seeds."""
    study = a_study.study(["base", "arm"], [a_study.predicts("arm", **settings)])
    values = {"base": 1.0, "arm": 1.0 + effect}
    runs = a_study.measured(
        study, lambda arm, seed: {"gold_gain": values[arm.name] + (NOISE[seed] if arm.name == "arm" else 0.0)}
    )
    ((_, verdict),) = verdicts.decide(runs)
    return verdict


@pytest.mark.parametrize(
    ("effect", "direction", "at_least", "word"),
    [
        (0.1, "more", 0.0, SUPPORTED),
        (0.1, "less", 0.0, NOT_SUPPORTED),
        (-0.1, "less", 0.05, SUPPORTED),
        (0.01, "more", 0.0, INCONCLUSIVE),  # the interval holds 0
        (-0.01, "more", 0.05, NOT_SUPPORTED),  # not certainly below 0, but certainly below what would matter
        (0.04, "more", 0.05, INCONCLUSIVE),  # it is there, it may be large enough
        (0.06, "more", 0.05, SUPPORTED),
        (0.03, "more", 0.05, NOT_SUPPORTED),  # it is there, and too small to matter
        (0.02, "same", 0.05, SUPPORTED),
        (0.04, "same", 0.05, INCONCLUSIVE),
        (-0.08, "same", 0.05, NOT_SUPPORTED),
    ],
)
def test_the_word_follows_from_the_interval_and_what_would_matter(
    effect: float, direction: str, at_least: float, word: str
):
    verdict = judged(effect, direction=Direction(direction), min_effect=at_least)
    assert verdict.effect is not None
    assert verdict.effect.value == pytest.approx(effect)
    assert verdict.effect.interval == pytest.approx((effect - HALF, effect + HALF), abs=1e-4)
    assert verdict.word == word
    assert verdict.seeds == [0, 1, 2, 3, 4]
    assert verdict.note == ""


def test_the_detectable_effect_is_that_of_the_spread_between_these_seeds():
    verdict = judged(0.01)
    assert verdict.detectable == pytest.approx(1.682 * 0.0158114, rel=1e-3)  # of Cohen's d for n = 5


def test_holm_runs_over_the_primary_predictions_and_for_the_others_over_all():
    arms = ["a", "b", "c"]
    predictions = [a_study.predicts(arm, primary=arm != "c") for arm in arms]
    predictions.append(a_study.predicts("c", direction=Direction.same, min_effect=9.0))
    study = a_study.study(["base", *arms], predictions)
    shifts = {"base": 0.0, "a": 0.03, "b": 0.022, "c": 0.021}
    runs = a_study.measured(
        study, lambda arm, seed: {"gold_gain": shifts[arm.name] + (arm.name != "base") * NOISE[seed]}
    )
    found = [verdict for _, verdict in verdicts.decide(runs)]
    p = [paired_tests.p_value([shifts[arm] + noise for noise in NOISE]) for arm in arms]
    assert all(each is not None for each in p)
    assert [v.p for v in found[:3]] == pytest.approx(p)
    assert found[0].p_holm == pytest.approx(2 * p[0])
    assert found[1].p_holm == pytest.approx(p[1])
    assert found[2].p_holm == pytest.approx(paired_tests.holm(p)[2])
    assert found[3].p_holm is None
    assert found[3].word == SUPPORTED


def test_a_study_is_supported_if_all_its_primary_predictions_are():
    def overall(*words: tuple[str, bool]) -> str:
        return verdicts.study_verdict(
            [(a_study.predicts("x", primary=primary), Verdict(word)) for word, primary in words]
        )

    assert overall((SUPPORTED, True), (SUPPORTED, True), (NOT_SUPPORTED, False)) == SUPPORTED
    assert overall((SUPPORTED, True), (INCONCLUSIVE, True)) == INCONCLUSIVE
    assert overall((INCONCLUSIVE, True), (NOT_SUPPORTED, True)) == NOT_SUPPORTED
    assert overall((SUPPORTED, False)) == INCONCLUSIVE


def test_one_seed_says_nothing():
    study = a_study.study(["base", "arm"], [a_study.predicts("arm")], seeds=1)
    runs = a_study.measured(study, lambda arm, seed: {"gold_gain": float(arm.name == "arm")})
    ((_, verdict),) = verdicts.decide(runs)
    assert (verdict.word, verdict.note, verdict.p, verdict.detectable) == (INCONCLUSIVE, "one seed", None, None)
    assert verdict.effect is not None
    assert verdict.effect.value == 1.0


def test_seeds_that_are_all_alike_say_nothing_but_of_what_is_counted():
    of_one = {"measure": Measure.level, "value": 1.0}
    study = a_study.study(
        ["base", "arm"],
        [
            a_study.predicts("arm"),
            a_study.predicts("arm", "memory/weights"),
            a_study.predicts("arm", "memory/weights", direction=Direction.same, min_effect=1.1),
            a_study.predicts("base", "memory/weights", **of_one, direction=Direction.same, min_effect=1.05),
            a_study.predicts("base", "memory/weights", **of_one),
        ],
    )  # fmt: skip
    runs = a_study.measured(
        study,
        lambda arm, seed: a_study.run(
            arm.name, seed, {"gold_gain": 1.0}, memory={"weights": 2.0 if arm.name == "arm" else 1.0}
        ),
    )
    found = [verdict for _, verdict in verdicts.decide(runs)]
    assert [verdict.word for verdict in found] == [INCONCLUSIVE, SUPPORTED, NOT_SUPPORTED, SUPPORTED, NOT_SUPPORTED]
    assert found[0].note == "zero variance between seeds, so no interval"
    assert found[1].note == "exact count, equal for every seed"


def test_what_occurs_or_does_not_is_judged_by_the_share_of_seeds():
    finding = {"name": "too easy", "severity": "warning", "message": "", "threshold": "", "suggestion": ""}
    level = {"measure": Measure.level, "metric": "health/too_easy", "value": 0.2}
    study = a_study.study(
        ["base", "easy"], [a_study.predicts("easy", **level), a_study.predicts("base", **level | {"direction": Direction.less})]
    )  # fmt: skip
    runs = a_study.measured(
        study, lambda arm, seed: a_study.run(arm.name, seed, {}, health=[finding] if arm.name == "easy" else [])
    )
    (_, always), (_, never) = verdicts.decide(runs)
    assert always.word == SUPPORTED
    assert always.effect is not None
    assert always.effect.value == pytest.approx(0.8)
    assert always.effect.interval == pytest.approx((0.025 ** (1 / 5) - 0.2, 0.8))
    assert always.p == pytest.approx(0.2**5)
    assert never.word == INCONCLUSIVE  # none of five: the share may be .52


def missing(status: str, seeds: tuple[int, ...], rule: Missing = Missing.left_out) -> Verdict:
    study = a_study.study(["base", "arm"], [a_study.predicts("arm")], missing=rule)

    def values(arm: Arm, seed: int) -> Mapping[str, float] | RunData:
        if arm.name == "arm" and seed in seeds:
            return RunData(Path("x"), "arm", seed, status, "ValueError: no")
        return {"gold_gain": 1.0 + (1.0 + NOISE[seed]) * (arm.name == "arm")}

    ((_, verdict),) = verdicts.decide(a_study.measured(study, values))
    return verdict


def test_a_failed_seed_is_told_and_the_others_decide_as_earlier_versions_registered_it():
    verdict = missing("failed", (1, 4))
    assert (verdict.word, verdict.seeds, verdict.note) == (SUPPORTED, [0, 2, 3], "2 of 5 seeds missing")
    assert verdict.missing[4] == "arm, seed 4: status failed, gold_gain was not measured"
    assert missing("failed", (0, 1, 2)).word == INCONCLUSIVE  # under half of them
    assert missing("failed", (0, 1, 2, 3, 4)).note == "not measured; 5 of 5 seeds missing"


@pytest.mark.parametrize("status", ["not started", "running", "interrupted", "preempted", "missing"])
def test_a_study_that_goes_on_has_no_verdict_yet(status: str):
    verdict = missing(status, (4,))
    assert (verdict.word, verdict.note) == (INCONCLUSIVE, "1 of 5 seeds not finished")
    assert verdict.p is not None
    assert verdict.p < 0.001  # what stops when it likes the result is no test


def over_beta(**settings) -> Prediction:
    return a_study.predicts("dpo", measure=Measure.slope, axis="beta", **settings)


def test_a_slope_is_that_of_least_squares_per_factor_of_ten():
    betas = (0.01, 0.1, 1.0, 5.0)
    arms = ["base", *(Arm(f"beta {beta}", [], "dpo", {"beta": beta}) for beta in betas)]
    study = a_study.study(arms, [over_beta(direction=Direction.less)], seeds=3)
    rng = np.random.default_rng(0)
    table = {
        (arm.name, seed): float(rng.normal(-arm.axes.get("beta", 0.0))) for arm in study.arms for seed in study.seeds
    }
    runs = a_study.measured(study, lambda arm, seed: {"gold_gain": table[arm.name, seed]})
    found, left_out = verdicts.effect_per_seed(study.predictions[0], runs)
    assert left_out == {}
    for seed in study.seeds:
        values = [table[f"beta {beta}", seed] for beta in betas]
        assert found[seed] == pytest.approx(np.polyfit(np.log10(betas), values, 1)[0])


def test_a_slope_over_an_axis_with_a_zero_is_per_unit_and_needs_every_arm():
    rates = (0.0, 0.2, 0.4)
    arms = [Arm(f"noise {rate}", [], "dpo", {"beta": rate}) for rate in rates]
    study = a_study.study(arms, [over_beta()], seeds=2)
    runs = a_study.measured(
        study,
        lambda arm, seed: (
            RunData(Path("x"), arm.name, 1, "failed")
            if (arm.name, seed) == ("noise 0.4", 1)
            else {"gold_gain": 1.0 - 3 * arm.axes["beta"]}
        ),
    )
    found, left_out = verdicts.effect_per_seed(study.predictions[0], runs)
    assert found == {0: pytest.approx(-3.0)}
    assert left_out == {1: "noise 0.4, seed 1: status failed, gold_gain was not measured"}


def test_slopes_of_two_groups_are_compared_at_an_equal_value():
    """Each rate of each group has two arms; the metric is read off between them where KL is 2."""

    def numbers(arm: Arm, seed: int) -> dict[str, float]:
        rate, kl = arm.axes["rate"], 3 / arm.axes["beta"]
        return {"kl": kl, "gold_gain": kl - (5 if arm.group == "dpo" else 2) * rate}

    arms = [
        Arm(f"{group} {rate} {beta}", [], group, {"rate": rate, "beta": beta})
        for group in ("dpo", "rl")
        for rate in (0.0, 0.4)
        for beta in (1.0, 3.0)
    ]
    prediction = a_study.predicts("rl", measure=Measure.slope, axis="rate", control="dpo", matched_on={"kl": 2})
    study = a_study.study([*arms], [prediction], seeds=1)
    verdicts.check(study)
    found, left_out = verdicts.effect_per_seed(prediction, a_study.measured(study, numbers))
    assert (found, left_out) == ({0: pytest.approx(3.0)}, {})  # -2 - -5
    assert verdicts.describe(prediction) == "gold_gain: slope over rate of rl - dpo, at kl 2"
    with pytest.raises(StudyError, match="needs two arms or more of rl at each value of rate"):
        verdicts.check(a_study.study([*arms[:5], *arms[6:]], [prediction]))


def line(gains: tuple[float, ...], kls: tuple[float, ...], forms: tuple[float, ...], value: float) -> float:
    """well_formed of a group at an equal gain, arms listed from the mildest on."""
    arms = ["base", *(Arm(f"arm {number}", [], "dpo") for number in range(len(gains)))]
    columns = enumerate(zip(gains, kls, forms, strict=True))
    numbers = {f"arm {n}": {"gold_gain": gain, "kl": kl, "well_formed": form} for n, (gain, kl, form) in columns}
    runs = a_study.measured(a_study.study(arms, seeds=1), lambda arm, seed: numbers.get(arm.name, {}))
    return interpolate_at(runs, "dpo", "well_formed", "gold_gain", value, 0)


def test_a_value_at_equal_gain_is_read_off_between_two_arms():
    assert line((0.2, 0.6, 1.0), (0.1, 0.3, 0.8), (1.0, 0.9, 0.5), 0.7) == pytest.approx(0.8)  # a quarter of the way
    assert line((0.2, 0.6, 1.0), (0.1, 0.3, 0.8), (1.0, 0.9, 0.5), 0.6) == pytest.approx(0.9)
    # it gains .7 on the way up, and once more as it falls apart: the former is meant
    assert line((0.2, 0.9, 0.5), (0.1, 0.5, 30.0), (1.0, 0.3, 0.0), 0.7) == pytest.approx(1 - 0.7 * 5 / 7)
    assert line((0.5, 0.9, 0.2), (30.0, 0.5, 0.1), (0.0, 0.3, 1.0), 0.7) == pytest.approx(1 - 0.7 * 5 / 7)
    with pytest.raises(NotMeasured, match=r"dpo, seed 0: gold_gain 1.2 lies outside of its 0.2 .. 1"):
        line((0.2, 0.6, 1.0), (0.1, 0.3, 0.8), (1.0, 0.9, 0.5), 1.2)


def test_arms_follow_the_axis_that_they_alone_differ_on_however_they_are_listed():
    arms = ["base", *(Arm(f"beta {beta}", [], "dpo", {"beta": beta, "lr": 1.0}) for beta in (0.1, 1.0, 0.3))]
    runs = a_study.measured(
        a_study.study(arms, seeds=1),
        lambda arm, seed: {"kl": 1 / arm.axes["beta"], "gold_gain": 1 - arm.axes["beta"]} if arm.axes else {},
    )
    # between beta .3 (gain .7, KL 3.33) and 1 (gain 0, KL 1), and not between .1 and 1
    assert interpolate_at(runs, "dpo", "kl", "gold_gain", 0.35, 0) == pytest.approx((1 / 0.3 + 1) / 2)


@pytest.mark.parametrize(
    ("arms", "told"), [(2, ""), (3, "3 arms against 2: a frontier of more arms can only be higher")]
)
def test_groups_of_unequal_size_are_told_where_areas_are_compared(arms, told):
    every = [
        "base",
        *(Arm(f"dpo {at}", [], "dpo") for at in range(arms)),
        Arm("ipo 0", [], "ipo"),
        Arm("ipo 1", [], "ipo"),
    ]
    area = Prediction("x", Measure.area, "dpo", Direction.more, control="ipo")
    ((_, verdict),) = verdicts.decide(a_study.measured(a_study.study(every, [area]), lambda arm, seed: {"kl": 1.0}))
    assert verdict.note.endswith(told)
    assert ("arms against" in verdict.note) == bool(told)
    alone = replace(area, control="", value=0.5)  # held against a value, and no group
    ((_, verdict),) = verdicts.decide(a_study.measured(a_study.study(every, [alone]), lambda arm, seed: {"kl": 1.0}))
    assert "arms against" not in verdict.note


def test_an_area_is_a_share_of_the_optimum_from_that_seeds_candidates(tmp_path: Path):
    study = a_study.study(
        ["base", Arm("mild", [], "dpo"), Arm("strong", [], "dpo")],
        [Prediction("most of it", Measure.area, "dpo", Direction.more, value=0.5)],
        seeds=2,
    )
    rewards = np.random.default_rng(0).normal(size=(8, 64))
    (tmp_path / "examples.jsonl").write_text(
        '{"kind": "prompt", "key": "x", "gold": 1.0}\n'
        + "".join(f'{{"kind": "candidates", "key": "{n}", "gold": {row.tolist()}}}\n' for n, row in enumerate(rewards))
    )

    def values(arm: Arm, seed: int) -> RunData:
        strength = {"base": 0.0, "mild": 0.5, "strong": 1.0}[arm.name]
        run = a_study.run(arm.name, seed, {"gold_gain": strength, "kl": 1.5 * strength})
        has_candidates = arm.name == "strong" and seed == 0  # any run of the seed will do
        return RunData(tmp_path, arm.name, seed, "done", None, run.record, run.metrics) if has_candidates else run

    runs = a_study.measured(study, values)
    found, left_out = verdicts.effect_per_seed(study.predictions[0], runs)
    best = frontier.tilt(rewards, rewards.std() / frontier.TILTS)
    by_hand = (1.0 * 1.5 / 2 + 0.5 * 1.0) / sum(
        (b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(frontier.hull(best), frontier.hull(best)[1:], strict=False)
    )
    assert found == {0: pytest.approx(by_hand - 0.5)}
    assert left_out == {1: "seed 1: no run sampled candidates of the initial policy; type evals=study"}


def test_arms_are_compared_with_the_baseline_seed_by_seed():
    study = a_study.study(["base", "better", "alike", "failed"])
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 3, 5)  # what all runs of a seed share

    def values(arm: Arm, seed: int) -> Mapping[str, float] | RunData:
        if arm.name == "failed" or (arm.name, seed) == ("alike", 2):
            return RunData(Path("x"), arm.name, seed, "failed", "ValueError: no")
        return {
            "gold_gain": float(
                hard[seed] + (arm.name == "better") * (0.5 + NOISE[seed]) + (arm.name == "alike") * NOISE[seed]
            )
        }

    table = verdicts.versus_baseline(a_study.measured(study, values), "gold_gain")
    assert list(table) == ["base", "better", "alike"]
    assert table["base"][1:] == (None, None, Scale.plain)
    value, apart, p, _ = table["better"]
    assert value.interval is not None
    assert value.interval[0] < 0 < value.interval[1]
    assert apart is not None
    assert apart.interval == pytest.approx((0.5 - HALF, 0.5 + HALF), abs=1e-4)
    assert p == pytest.approx(2 * paired_tests.p_value([0.5 + noise for noise in NOISE]))
    _, apart, p, _ = table["alike"]
    assert apart is not None
    assert apart.n == 4
    assert p is not None
    assert p > 0.5


def test_one_seed_can_be_asked_over_prompts():
    rng = np.random.default_rng(2)
    rows = [{}, {}]
    for n in range(60):
        hard = float(rng.normal(0, 3))
        for side in (0, 1):
            for again in ("", "#2"):
                rows[side][f"{n}{again}"] = {"gold": hard + side + float(rng.normal(0, 0.1))}
    base, better = (_Known(Path("x"), "arm", 0, "done", record={"prompts": found}) for found in rows)
    estimate = verdicts.by_prompt(better, base)
    assert estimate is not None
    assert estimate.n == 120
    assert estimate.interval is not None
    assert 0.9 < estimate.interval[0] < 1 < estimate.interval[1] < 1.1
    few = _Known(Path("x"), "arm", 0, "done", record={"prompts": dict(list(rows[0].items())[:80])})
    assert verdicts.by_prompt(better, few) is None  # 40 prompts, each twice


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 3.0), (1.0, 0.5)])
def test_how_much_of_the_spread_between_seeds_comes_from_too_few_prompts(of_seeds: float, of_prompts: float):
    rng = np.random.default_rng(3)
    prediction = a_study.predicts("arm")
    study = a_study.study(["base", "arm"], [prediction], 40)
    shifts = rng.normal(0, of_seeds, 40)

    def values(arm: Arm, seed: int) -> RunData:
        gold = rng.normal(shifts[seed] * (arm.name == "arm"), of_prompts, 64)
        rows = {f"{n}": {"gold": float(value)} for n, value in enumerate(gold)}
        return _Known(Path("x"), arm.name, seed, "done", record={"prompts": rows, "started": a_study.BEGUN})

    runs = a_study.measured(study, values)
    share = verdicts.share_from_prompts(prediction, runs)
    expected = 2 * of_prompts**2 / 64 / (of_seeds**2 + 2 * of_prompts**2 / 64)
    assert share == pytest.approx(expected, abs=0.35 if not of_seeds else 0.01)
    assert verdicts.share_from_prompts(a_study.predicts("arm", "kl"), runs) is None
    assert verdicts.share_from_prompts(a_study.predicts("arm", measure=Measure.level), runs) is None


class _Known(RunData):
    def examples(self):
        return {"prompt": self.record["prompts"]}


def test_what_could_never_be_computed_is_refused_before_the_runs():
    off = [Arm("beta 1", [], "dpo", {"beta": 1.0}), Arm("other", [], "dpo")]
    with pytest.raises(
        StudyError, match=r"predictions\[0\].axis=beta: needs two arms or more in dpo, all with a value of it"
    ):
        verdicts.check(a_study.study(["base", *off], [over_beta()]))
    with pytest.raises(StudyError, match=r"predictions\[0\].matched_on: base is one arm; type a group"):
        verdicts.check(a_study.study(["base", *off], [a_study.predicts("dpo", matched_on={"gold_gain": 0.5})]))
    verdicts.check(
        a_study.study(["base", *off], [a_study.predicts("other"), a_study.predicts("dpo", "kl / gold_gain")])
    )


def test_what_is_measured_is_told_in_a_line():
    assert verdicts.describe(over_beta()) == "gold_gain: slope over beta of dpo"
    assert (
        verdicts.describe(a_study.predicts("a", "kl", matched_on={"gold_gain": 0.9}))
        == "kl: a - base, at gold_gain 0.9"
    )
    assert verdicts.describe(a_study.predicts("a", measure=Measure.level, value=0.5)) == "gold_gain: a - 0.5"
    assert verdicts.describe(a_study.predicts("a", measure=Measure.level)) == "gold_gain: a"
    area = Prediction("x", Measure.area, "dpo", Direction.more, control="ipo")
    assert verdicts.describe(area) == "area under the frontier: dpo - ipo"
