"""Single pairs under evaluation, and the rank correlation with gold: by hand, against scipy, with the interval it claims."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluators.preference import Preference
from dpo_lab.models.policy import Policy
from dpo_lab.runs.examples import EXAMPLES, PairExample, pair_examples, read
from dpo_lab.stats.estimates import rank_correlation
from tests.conftest import make_pairs
from tests.evals.test_evals import perturbed, subject_of


@pytest.fixture
def subject(policy: Policy) -> EvalContext:
    return subject_of(perturbed(policy, 0.02), policy, ["the plot"])


def rows_of(subject: EvalContext, folder: Path) -> list[PairExample]:
    """The pairs as they come back from the file that a run leaves."""
    subject.examples.write(folder / EXAMPLES)
    return pair_examples(read(folder / EXAMPLES))


def test_pairs_under_both_policies_by_hand(subject, tmp_path):
    train = [pair.flip() for pair in make_pairs(5, seed=3)]
    subject.train_pairs = train
    metrics = dict(Preference().run(subject))
    rows = rows_of(subject, tmp_path)
    assert [row.key for row in rows] == [pair.key for pair in (*subject.pairs, *train)]
    assert [row.split for row in rows] == ["held-out"] * 9 + ["train"] * 5
    assert [row.flipped for row in rows] == [False] * 9 + [True] * 5
    for row, pair in zip(rows, [*subject.pairs, *train], strict=True):
        responses = [pair.chosen, pair.rejected]
        trained, lengths = subject.response_logps(subject.trained.model, [pair.prompt] * 2, responses)
        initial, _ = subject.response_logps(subject.initial.model, [pair.prompt] * 2, responses)
        assert [row.logp_chosen, row.logp_rejected] == pytest.approx(trained.tolist(), rel=1e-5)
        ratios = (trained - initial).tolist()
        assert [row.logratio_chosen, row.logratio_rejected] == pytest.approx(ratios, abs=1e-4)
        assert row.margin == pytest.approx(ratios[0] - ratios[1], abs=1e-4)
        assert [row.length_chosen, row.length_rejected] == lengths.tolist()
        assert row.gold_margin is None if math.isnan(pair.gold_margin) else row.gold_margin == pair.gold_margin
    held_out = [row for row in rows if row.split == "held-out"]
    assert np.mean([row.margin for row in held_out]) == pytest.approx(metrics["margin"].value)


def test_gold_correlation_by_hand(subject):
    found = dict(Preference().run(subject))["gold_correlation"]
    gold = np.array([pair.gold_margin for pair in subject.pairs])
    known = ~np.isnan(gold)
    assert found.value == pytest.approx(stats.spearmanr(subject.held_out.margins[known], gold[known]).statistic)
    assert found.n == known.sum() == 7


def test_an_untrained_policy_has_no_gold_correlation(policy):
    assert "gold_correlation" not in dict(Preference().run(subject_of(policy, policy, ["the plot"])))


def test_no_truth_no_gold_correlation(subject):
    subject.pairs = subject.pairs[:1]  # whose gold is not known
    assert "gold_correlation" not in dict(Preference().run(subject))


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ([1, 2, 3], [10, 20, 15], 0.5),
        ([1, 2], [5, -5], -1.0),
        (range(50), [x**3 for x in range(50)], 1.0),
        ([1, 1, 2, 2], [1, 2, 3, 4], 0.894427191),  # ties share their mean rank
    ],
)
def test_rank_correlation_by_hand(left, right, value):
    found = rank_correlation(left, right)
    assert found is not None
    assert found.value == pytest.approx(value)
    assert (found.interval is None) == (len(left) < 4 or abs(value) == 1)


def test_no_rank_correlation_of_what_is_all_alike():
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3], [2, 2, 2]) is None
    assert rank_correlation([], []) is None


def test_the_interval_of_a_rank_correlation_covers_it():
    """Normal pairs of correlation r have the rank correlation 6 / pi asin(r / 2)."""
    rng, covered, r = np.random.default_rng(0), 0, 0.5
    for _ in range(400):
        x, noise = rng.normal(size=(2, 60))
        found = rank_correlation(x.tolist(), (r * x + math.sqrt(1 - r**2) * noise).tolist())
        assert found is not None
        assert found.interval is not None
        covered += found.interval[0] <= 6 / math.pi * math.asin(r / 2) <= found.interval[1]
    assert 0.92 <= covered / 400 <= 0.98
