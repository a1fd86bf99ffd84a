"""The optimum of reward against KL, held to closed forms and to simulation; areas worked by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from dpo_lab.studies import frontier
from dpo_lab.studies.frontier import Point


def test_tilting_all_responses_there_are_is_the_closed_form():
    rewards = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, -1.0]])
    beta = 0.7
    gains, kls = [], []
    for prompt in rewards:  # initial x exp(r / beta) / Z, the initial policy uniform over three responses
        tilted = np.exp(prompt / beta) / np.exp(prompt / beta).sum()
        gains.append(float(tilted @ prompt - prompt.mean()))
        kls.append(sum(p * math.log(p / (1 / 3)) for p in tilted))
    (point,) = frontier.tilt(rewards, [beta])
    assert point.gain == pytest.approx(np.mean(gains) / rewards.std())
    assert point.kl == pytest.approx(np.mean(kls))


def test_no_policy_beats_the_tilted_one():
    rewards = np.array([[0.0, 1.0, 2.0]])
    for beta in (0.3, 1.0, 3.0):
        (best,) = frontier.tilt(rewards, [beta])
        aim = best.gain * rewards.std() - beta * best.kl
        grid = np.linspace(0.005, 0.985, 50)
        for p, q in product(grid, grid):
            policy = np.array([p, q, 1 - p - q])
            if policy[2] > 0:
                kl = float(policy @ np.log(3 * policy))
                assert float(policy @ rewards[0]) - rewards.mean() - beta * kl <= aim + 1e-12


def test_of_gaussian_rewards_the_gain_is_the_square_root_of_twice_the_kl():
    rewards = np.random.default_rng(0).normal(3.0, 2.0, (4, 100_000))
    for tilt in (0.5, 1.0, 1.5):
        (point,) = frontier.tilt(rewards, [2.0 / tilt])
        assert point.gain == pytest.approx(tilt, rel=0.02)
        assert point.kl == pytest.approx(tilt**2 / 2, rel=0.03)
        assert point.ess == pytest.approx(100_000 * math.exp(-(tilt**2)), rel=0.1)


def test_from_128_candidates_the_line_is_a_little_low_and_says_where_it_is_not_to_be_trusted():
    rewards = np.random.default_rng(1).normal(size=(256, 128))
    points = frontier.tilt(rewards, 1 / frontier.TILTS)
    for kl, lacks in ((0.5, 0.02), (1.0, 0.03), (frontier.KL_MAX, 0.05)):
        gain = np.interp(kl, [p.kl for p in points], [p.gain for p in points])
        assert (1 - lacks) * math.sqrt(2 * kl) < gain < 1.01 * math.sqrt(2 * kl)
    assert [p.is_trusted for p in points] == sorted((p.is_trusted for p in points), reverse=True)
    assert points[0].is_trusted
    assert not points[-1].is_trusted
    assert points[-1].kl < math.log(128)


def test_best_of_n_is_the_mean_of_simulated_maxima():
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(3, 12))
    for n in (1, 2, 5, 12):
        (point,) = frontier.best_of_n(rewards, [n])
        picks = np.array([rng.choice(row, n, replace=False).max() for row in rewards for _ in range(4000)])
        assert point.gain == pytest.approx((picks.mean() - rewards.mean()) / rewards.std(), abs=0.03)
    with pytest.raises(ValueError, match="best of 13: there are 12"):
        frontier.best_of_n(rewards, [13])


def test_the_kl_of_best_of_n_is_a_bound_from_above_and_near_for_many_responses():
    def exact(size: int, n: int) -> float:  # over `size` equally likely responses of distinct rewards
        chances = [((k + 1) ** n - k**n) / size**n for k in range(size)]
        return sum(p * math.log(p * size) for p in chances if p)

    for n in (2, 4, 16):
        (bound,) = frontier.best_of_n(np.arange(32.0)[None], [n])
        assert exact(4, n) < exact(64, n) < bound.kl
        assert exact(4000, n) == pytest.approx(bound.kl, rel=0.01)


def test_an_area_by_hand():
    optimum = [Point(1.0, 1.0), Point(1.5, 2.0)]  # under it: 0.5 + 1.25
    assert frontier.area(optimum, optimum, kl_max=2.0) == 1.0
    # (0, 0) to (0.5, 0.5), then level: 0.125 + 0.75
    assert frontier.area([Point(0.5, 0.5)], optimum, kl_max=2.0) == pytest.approx(0.875 / 1.75)
    # a corner under the line and one that overdid it change nothing, nor does what lies to the left of 0
    more = [Point(0.5, 0.5), Point(0.1, 0.4), Point(-1.0, 60.0)]
    assert frontier.area(more, optimum, kl_max=2.0) == pytest.approx(0.875 / 1.75)
    assert frontier.area([Point(-0.3, 0.2)], optimum, kl_max=2.0) == 0.0
    # cut where the budget ends: half-way to (4, 2) it has 1
    assert frontier.hull([Point(2.0, 4.0)], kl_max=2.0) == [(0.0, 0.0), (2.0, 1.0)]
    assert frontier.hull([Point(0.2, -0.01)], kl_max=2.0) == [(0.0, 0.2), (2.0, 0.2)]


def test_a_hull_is_concave_never_falls_and_lies_above_all():
    rng = np.random.default_rng(3)
    for _ in range(50):
        points = [Point(*pair) for pair in rng.uniform(-0.2, 1.8, (8, 2))]
        corners = frontier.hull(points)
        kls, gains = zip(*corners, strict=True)
        assert kls[0] == 0.0
        assert kls[-1] == frontier.KL_MAX
        slopes = np.diff(gains) / np.diff(kls)
        assert (slopes >= 0).all()
        assert (np.diff(slopes) <= 1e-9).all()
        assert all(np.interp(max(0, p.kl), kls, gains) >= p.gain - 1e-9 for p in points)


def test_no_area_where_the_best_gains_nothing():
    with pytest.raises(ValueError, match="the optimum gains nothing"):
        frontier.area([Point(1.0, 1.0)], [])
