"""The embedded task: its grammar round trip, worked rewards, variety, splits that never overlap, its annotator."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from dpo_lab.core.pairs import Pair
from dpo_lab.data.splits import HELD_OUT, TRAIN, split_of
from dpo_lab.data.tasks.base import Rejected
from dpo_lab.data.tasks.grammar import parse, sample_prompt, sample_review
from dpo_lab.data.tasks.reviews import Reward, SyntheticReviews


@pytest.mark.parametrize("clauses", [1, 2, 3, 4, 5])
def test_every_sampled_review_parses_back(clauses):
    rng = random.Random(clauses)
    for _ in range(500):
        review = parse(sample_review(rng, clauses))
        assert review.well_formed
        assert len(review.clauses) == clauses
        assert 1 <= review.sentences <= clauses


def test_sentence_and_clause_parts():
    review = parse("Honestly, the plot was not very good, but I loved its cast. There was no silence in the script.")
    assert review.well_formed
    assert review.sentences == 2
    assert [c.valence for c in review.clauses] == [-0.75, 3.0, -0.0]
    assert [c.weight for c in review.clauses] == [0.5, 1.5, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "The plot was good..",
        "The plot was good. ",
        " The plot was good.",
        "The plot was good",
        "the plot was good.",
        "Honestly, The plot was good.",
        "honestly, the plot was good.",
        "Honestly the plot was good.",
        "The  plot was good.",
        "The plot was goodly.",
        "The plot good.",
        "The plot was.",
        "The plot was good the cast was good.",
        "The plot was good and.",
        "The plot was good but the cast was good.",  # its comma is missing
        "The plot was good, and the cast was good.",  # a comma too many
        "The plot was good and The cast was good.",
        "The plot was good.The cast was good.",
        "The plot was very not good.",
        "I loved the plot plot.",
        "There was charm in the plot.",
        "The plot was good\n.",
    ],
)
def test_near_misses_are_not_reviews(text):
    assert not parse(text).well_formed


@pytest.mark.parametrize(
    ("text", "mean", "total"),
    [
        ("The plot was superb.", 3, 3),
        ("The plot was not superb.", -1.5, -1.5),
        ("The plot was not very good.", -0.75, -0.75),
        ("Its cast felt extremely awful.", -6, -6),
        ("I really enjoyed the finale.", 3, 3),
        ("I never hated the finale.", 1.5, 1.5),
        ("There was so much charm in its hero.", 4, 4),
        ("There was no charm in its hero.", -1, -1),
        ("The hero left me slightly cold.", -0.5, -0.5),
        ("The plot was good and the cast was odd.", 0.5, 1),
        # "but": (0.5 * 3 + 1.5 * -2) / 2
        ("The plot was superb, but the cast was boring.", -0.75, -1.5),
        # "although": (1.5 * 3 + 0.5 * -2) / 2
        ("The plot was superb, although the cast was boring.", 1.75, 3.5),
        # a contrast weighs its own sentence only
        ("The plot was superb. The cast was good, but the hero was weak.", (3 + 0.5 - 1.5) / 3, 2),
        # two contrasts: weights .25, .75, 2.25
        ("The plot was good, but the cast was good, but the hero was weak.", (0.25 + 0.75 - 2.25) / 3.25, -1.25),
        ("The plot was superb. The plot plot plot.", 1.5, 3),  # what is no clause is a clause worth 0
        ("superb superb superb", 0, 0),
        ("", 0, 0),
    ],
)
def test_gold_by_hand(text, mean, total):
    assert SyntheticReviews().gold(text) == pytest.approx(mean)
    assert SyntheticReviews(reward=Reward.sum).gold(text) == pytest.approx(total)


def test_length_buys_no_mean_reward():
    once = "The plot was superb."
    assert SyntheticReviews().gold(" ".join([once] * 20)) == SyntheticReviews().gold(once)
    assert SyntheticReviews(reward=Reward.sum).gold(" ".join([once] * 20)) == 20 * SyntheticReviews().gold(once)


def test_reviews_are_scaled():
    gold = [SyntheticReviews().gold(text) for text in SyntheticReviews().texts(TRAIN, 5000, seed=0)]
    assert sum(gold) / len(gold) == pytest.approx(0, abs=0.1)
    assert math.sqrt(sum(g * g for g in gold) / len(gold)) == pytest.approx(1, abs=0.1)


def test_well_formed_asks_for_the_shape():
    task = SyntheticReviews()
    assert task.well_formed("The plot was good. The cast was good. The hero was good.")
    assert not task.well_formed("The plot was good. The cast was good.")
    assert SyntheticReviews(min_clauses=1).well_formed("The plot was good. The cast was good.")


def test_50000_reviews_hardly_repeat():
    rng = random.Random(0)
    reviews = [sample_review(rng, rng.randint(1, 3)) for _ in range(75_000)]
    longer = [r for r in reviews if r.count(".") > 1]
    assert len(longer) > 20_000
    assert len(set(longer)) / len(longer) > 0.99
    shaped = [sample_review(rng, 3) for _ in range(50_000)]
    assert len(set(shaped)) / len(shaped) > 0.99


@pytest.mark.parametrize("draw", ["texts", "prompts"])
def test_splits_never_overlap_whatever_the_seed(draw):
    task = SyntheticReviews()
    train = {text for seed in range(4) for text in getattr(task, draw)(TRAIN, 1500, seed)}
    held_out = {text for seed in range(4) for text in getattr(task, draw)(HELD_OUT, 1500, seed)}
    assert train & held_out == set()
    assert {split_of(text) for text in train} == {TRAIN}


def test_texts_are_a_function_of_the_seed():
    task = SyntheticReviews()
    assert task.texts(TRAIN, 50, 1) == task.texts(TRAIN, 50, 1)
    assert len(set(task.texts(TRAIN, 50, 1)) & set(task.texts(TRAIN, 50, 2))) == 0
    assert task.prompts(TRAIN, 50, 1)[:20] == task.prompts(TRAIN, 20, 1)


def test_prompts_hold_nothing_of_value():
    rng = random.Random(0)
    for _ in range(2000):
        prompt = sample_prompt(rng, 3)
        assert SyntheticReviews().gold(prompt + ".") == 0
        assert not parse(prompt + ".").well_formed


def test_annotator_is_bradley_terry():
    task, rng, count = SyntheticReviews(temperature=0.5), random.Random(0), 4000
    first, second = " was odd.", " was good."  # gold 0 and 1
    chosen = Counter(task.label("The plot", first, second, rng).chosen for _ in range(count))
    p = 1 / (1 + math.exp(1 / 0.5))
    assert chosen[first] / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_annotator_keeps_the_truth_beside_the_label():
    task, rng = SyntheticReviews(temperature=100.0), random.Random(0)
    pairs = [task.label("The plot", " was superb.", " was weak.", rng) for _ in range(50)]
    assert {(p.chosen, p.gold_margin) for p in pairs} == {(" was superb.", 4.0), (" was weak.", -4.0)}


def test_extreme_differences_do_not_overflow():
    task = SyntheticReviews(temperature=1e-3)
    assert task.label("The plot", " was awful.", " was superb.", random.Random(0)).chosen == " was superb."


def test_pairs_name_what_they_drop():
    task = SyntheticReviews()

    def sample(prompts, stream):
        endings = {"first": [" a", None, " b"], "second": [" c", " d", " b"]}[stream.split("/")[1]]
        return [endings[i % 3] for i in range(len(prompts))]

    items = list(task.pairs(TRAIN, 3, 0, sample))
    assert isinstance(items[0], Pair)
    assert items[1:] == ["unfinished response", "identical sides"]


def test_scrambled_pairs_differ_from_sampled_ones_in_the_rejected_letters_order():
    sampled, scrambled = (
        list(
            SyntheticReviews(rejected=rejected).pairs(
                TRAIN, 20, 3, lambda prompts, name: SyntheticReviews().texts(TRAIN, 20, len(name))
            )
        )
        for rejected in Rejected
    )
    for plain, mixed in zip(sampled, scrambled, strict=True):
        assert (mixed.prompt, mixed.chosen) == (plain.prompt, plain.chosen)  # the annotator saw the samples
        assert sorted(mixed.rejected) == sorted(plain.rejected)
        assert mixed.rejected[0] == plain.rejected[0]
        assert not parse(mixed.prompt + mixed.rejected).well_formed
        gold = [SyntheticReviews().gold(mixed.prompt + side) for side in (mixed.chosen, mixed.rejected)]
        assert mixed.gold_margin == gold[0] - gold[1]


@pytest.mark.parametrize("settings", [{"min_clauses": 0}, {"min_clauses": 4, "max_clauses": 3}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"data.task.{next(iter(settings))}"):
        SyntheticReviews(**settings)
