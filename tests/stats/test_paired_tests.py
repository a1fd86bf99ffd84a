"""The statistics hold what they promise: coverage and false finds by simulation, every figure against another's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special
from scipy import stats as reference
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate


def test_intervals_of_five_seeds_cover_the_truth_in_95_of_100_studies():
    draws = np.random.default_rng(0).normal(0.3, 2.0, (10_000, 5))
    intervals = np.array([paired_tests.paired(list(effects)).interval for effects in draws])
    covered = np.mean((intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3))
    assert 0.94 <= covered <= 0.96
    # the normal's 1.96 would not: what Student's t is there for
    half = 1.96 * draws.std(1, ddof=1) / math.sqrt(5)
    assert np.mean(np.abs(draws.mean(1) - 0.3) < half) < 0.9


def test_ten_arms_that_do_nothing_win_in_at_most_five_and_a_half_of_100_studies():
    rng = np.random.default_rng(1)
    studies, arms, seeds = 10_000, 10, 5
    base, values = rng.normal(size=(studies, 1, seeds)), rng.normal(size=(studies, arms, seeds))
    effects = values - base  # all arms share a baseline's runs
    t = effects.mean(-1) / effects.std(-1, ddof=1) * math.sqrt(seeds)
    ps = 2 * special.stdtr(seeds - 1, -np.abs(t))
    ours = np.array([[paired_tests.p_value(list(arm)) for arm in study] for study in effects[:50]])
    np.testing.assert_allclose(ours, ps[:50], rtol=1e-9)
    # any adjusted p is below alpha iff the smallest is: Holm's first step
    wins = np.array([min(paired_tests.holm(study)) < paired_tests.ALPHA for study in ps])
    assert np.mean(wins) <= 0.055
    assert np.mean(ps.min(1) < paired_tests.ALPHA) > 0.2  # and unadjusted they would


def test_a_paired_test_is_that_of_scipy():
    rng = np.random.default_rng(2)
    for n in (2, 3, 5, 8):
        left, right = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
        twin = reference.ttest_rel(left, right)
        effects = list(left - right)
        assert paired_tests.p_value(effects) == pytest.approx(twin.pvalue, rel=1e-9)
        assert paired_tests.paired(effects).interval == pytest.approx(tuple(twin.confidence_interval(0.95)), rel=1e-9)
        assert paired_tests.paired(effects).n == n


def test_holm_is_that_of_statsmodels_and_of_the_paper():
    assert paired_tests.holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # 3 x .01; 2 x .03; the larger of .04 and .06
    assert paired_tests.holm([]) == []
    rng = np.random.default_rng(3)
    for size in (1, 2, 7):
        ps = rng.uniform(size=size).round(1)  # some are the same
        assert paired_tests.holm(list(ps)) == pytest.approx(list(multipletests(ps, method="holm")[1]))


@pytest.mark.parametrize("effects", [[0.2], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]])
def test_one_seed_and_seeds_that_are_all_alike_tell_no_error(effects: list[float]):
    estimate = paired_tests.paired(effects)
    assert estimate == Estimate(estimate.value, None, len(effects), None)
    assert estimate.value == pytest.approx(effects[-1])
    assert paired_tests.p_value(effects) is None


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05 / 6), (5, 0.05), (5, 0.05 / 20), (8, 0.01), (20, 0.05)])
def test_the_detectable_effect_is_found_four_times_of_five(n: int, alpha: float):
    sd = 0.3
    effect = paired_tests.min_detectable_effect(sd, n, alpha=alpha)
    draws = np.random.default_rng(n).normal(effect, sd, (40_000, n))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)
    assert np.mean(2 * special.stdtr(n - 1, -np.abs(t)) < alpha) == pytest.approx(0.8, abs=0.008)


def test_the_detectable_effect_is_that_of_statsmodels_where_it_converges():
    for n, alpha in ((5, 0.05), (8, 0.05), (8, 0.05 / 6), (20, 0.01)):
        twin = TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8, alternative="two-sided")
        assert paired_tests.min_detectable_effect(1.0, n, alpha=alpha) == pytest.approx(twin, rel=1e-4)


def test_what_occurs_has_an_exact_interval():
    share, p = paired_tests.binomial_test([1, 1, 1, 1, 1], 0.1)
    assert share.value == 1
    assert share.interval == pytest.approx((0.025 ** (1 / 5), 1.0))  # Clopper and Pearson: low^5 = 2.5 %
    assert p == pytest.approx(0.1**5)
    none, _ = paired_tests.binomial_test([0, 0, 0], 0.5)
    assert none.interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 3)))


def test_a_bootstrap_over_clusters_covers_what_one_over_examples_does_not():
    rng = np.random.default_rng(4)
    clusters = [str(number // 4) for number in range(240)]  # 60 prompts of 4 samples
    covered, naive = [], []
    for _ in range(300):
        values = np.repeat(rng.normal(size=60), 4) + rng.normal(0, 0.5, 240)
        estimate = paired_tests.cluster_bootstrap(values, clusters, draws=1000)
        assert estimate.interval is not None
        covered.append(estimate.interval[0] < 0 < estimate.interval[1])
        naive.append(abs(values.mean()) < 1.96 * values.std(ddof=1) / math.sqrt(240))
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(naive) < 0.8


def test_a_bootstrap_is_the_same_every_time_and_weighs_clusters_by_their_examples():
    clusters = [str(number) for number in range(60)] + ["0"] * 3
    values = [float(number) for number in range(60)] + [0.0] * 3
    estimate = paired_tests.cluster_bootstrap(values, clusters)
    assert estimate == paired_tests.cluster_bootstrap(values, clusters)
    assert estimate.value == pytest.approx(sum(values) / 63)
    assert estimate.n == 63


def test_seeds_are_no_clusters():
    with pytest.raises(ValueError, match="5 clusters: a bootstrap needs 50"):
        paired_tests.cluster_bootstrap([1.0, 2.0, 3.0, 4.0, 5.0], list("abcde"))
