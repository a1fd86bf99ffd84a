"""Label noise: exact at the ends, nested, keyed by the pair alone; and seeds by name."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from dpo_lab.core.noise import LabelNoise
from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.core.seeds import derive_seed

KEYS = [Pair("prompt", f"chosen {i}", f"rejected {i}").key for i in range(20_000)]


def flipped(rate: float, seed: int = 0, keys: list[str] = KEYS) -> set[str]:
    noise = LabelNoise(rate, seed)
    return {key for key in keys if noise.flips(key)}


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
        LabelNoise(rate)


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
