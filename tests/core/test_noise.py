"""Label noise: exact at the ends, nested, keyed by the pair alone; by uncertainty, and one-sided; and seeds by name."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from dpo_lab.core.noise import Gap, LabelNoise, OneSided, Side, Symmetric, Uncertainty
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.core.seeds import derive_seed

KEYS = [Pair("prompt", f"chosen {i}", f"rejected {i}").key for i in range(20_000)]


def table(
    keys: Sequence[str] = KEYS, gold: float = math.nan, scores: Sequence[float] = (), longer: int = 1
) -> PairTable:
    """Pairs of these keys; the chosen response of the first half has `longer` tokens, the others' two."""
    half = len(keys) // 2
    pairs = [EncodedPair(key, [1], [2] * (longer if i < half else 2), [3, 4], gold) for i, key in enumerate(keys)]
    return PairTable.of(pairs, scores)


def flipped_by(noise: LabelNoise, pairs: PairTable, margins: np.ndarray | None = None) -> set[str]:
    return {key.decode() for key in pairs.keys[noise.flips(pairs, margins)]}


def flipped(rate: float, seed: int = 0, keys: list[str] = KEYS) -> set[str]:
    return flipped_by(Symmetric(seed, rate), table(keys))


def test_rates_of_zero_and_one_are_exact():
    assert flipped(0.0) == set()
    assert flipped(1.0) == set(KEYS)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4, 0.5])
def test_the_rate_is_the_rate(rate):
    assert len(flipped(rate)) / len(KEYS) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(KEYS)))


def test_lower_rates_lie_inside_higher_ones():
    sets = [flipped(rate) for rate in (0.0, 0.1, 0.2, 0.4, 1.0)]
    for smaller, larger in pairwise(sets):
        assert smaller < larger


def test_order_and_subset_change_nothing():
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    assert flipped(0.3, keys=shuffled) == flipped(0.3)
    half = KEYS[::2]
    assert flipped(0.3, keys=half) == flipped(0.3) & set(half)


def test_another_seed_flips_others():
    both = flipped(0.3, 0) & flipped(0.3, 1)
    assert len(both) / len(KEYS) == pytest.approx(0.09, abs=0.01)  # independent sets


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan, math.inf])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="noise.rate="):
        Symmetric(rate=rate)
    with pytest.raises(ValueError, match="noise.rate="):
        OneSided(rate=rate)


def test_the_flipped_set_is_the_one_that_it_was():
    """Recorded runs name a rate and a seed: the same pairs must be flipped by them for ever."""
    assert [key[:6] for key in sorted(flipped(0.001, seed=4))][:3] == ["07a044", "0a2557", "2100c7"]


def test_uncertainty_flips_by_bradley_and_terry():
    """sigma(-gap / temperature): even odds at no gap, and the worked rate at a gap of one temperature."""
    for gold, rate in ((0.0, 0.5), (0.5, 1 / (1 + math.e)), (-0.5, 1 / (1 + math.e)), (1.0, 1 / (1 + math.e**2))):
        noise = Uncertainty(temperature=0.5)
        assert noise.rates(table(gold=gold))[0] == pytest.approx(rate)
        share = len(flipped_by(noise, table(gold=gold))) / len(KEYS)
        assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(KEYS)))
    assert flipped_by(Uncertainty(temperature=0.5), table(gold=1e6)) == set()


def test_hotter_annotators_err_on_more_pairs_and_on_all_of_those():
    pairs = table(gold=1.0)
    sets = [flipped_by(Uncertainty(temperature=t), pairs) for t in (0.2, 0.5, 1.0, 5.0)]
    for smaller, larger in pairwise(sets):
        assert smaller < larger


def test_gaps_are_gold_else_scores_else_the_initial_policys():
    scores = [2.0] * len(KEYS)
    scored, gold = table(scores=scores), table(gold=1.0, scores=scores)
    noise, by_reference = Uncertainty(), Uncertainty(gap=Gap.reference)
    assert noise.rates(scored)[0] == pytest.approx(1 / (1 + math.exp(2 / 0.25)))
    assert noise.rates(gold)[0] == pytest.approx(1 / (1 + math.exp(1 / 0.25)))
    margins = np.linspace(-3, 3, len(KEYS))
    assert (noise.needs_reference, by_reference.needs_reference) == (False, True)
    assert by_reference.rates(gold, margins) == pytest.approx(1 / (1 + np.exp(np.abs(margins) / 0.25)))
    with pytest.raises(ValueError, match=r"20,000 of 20,000 pairs came without scores.*type noise.gap=reference"):
        noise.flips(table())


def test_one_sided_noise_flips_one_side_only():
    """The first half's chosen is shorter by a token, the second half's as long as rejected."""
    pairs = table(longer=1)
    shorter = {key.decode() for key in pairs.keys[:10_000]}
    found = flipped_by(OneSided(rate=0.3), pairs)
    assert found == flipped(0.3) & shorter  # by the draw of the same name, so nested with the others
    assert flipped_by(OneSided(rate=1.0), pairs) == shorter
    assert flipped_by(OneSided(rate=1.0, side=Side.chosen_longer), pairs) == set()
    assert flipped_by(OneSided(rate=1.0, side=Side.chosen_longer), table(longer=3)) == shorter


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="noise.temperature="):
        Uncertainty(temperature=temperature)


def test_flipping_swaps_sides_truth_and_mark_and_twice_is_nothing():
    pair = EncodedPair("k", [1], [2, 3], [4], gold_margin=1.5)
    flip = pair.flip()
    assert flip == EncodedPair("k", [1], [4], [2, 3], gold_margin=-1.5, flipped=True)
    assert flip.flip() == pair


def test_keys_are_of_content():
    assert Pair("a", "b", "c").key == Pair("a", "b", "c", gold_margin=1.0).key
    keys = {
        Pair(*texts).key
        for texts in (("a", "b", "c"), ("a", "c", "b"), ("ab", "", "c"), ("a", "bc", ""), ("", "ab", "c"))
    }
    assert len(keys) == 5


def test_seeds_differ_by_name_and_stay():
    assert derive_seed(0, "order/0") == 1829853113658518448
    assert (
        len({derive_seed(seed, name) for seed in range(20) for name in ("order/0", "order/1", "init", "sft/order")})
        == 80
    )
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))
