"""Candidates of the initial policy: sampled once, kept and verified, the same for every run; and the best of some of them."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluators.optimum import Optimum
from dpo_lab.evals.judges import Scorer
from dpo_lab.models import sampling
from dpo_lab.runs.examples import EXAMPLES, read
from dpo_lab.stats.estimates import best_of
from tests.evals.test_evals import perturbed, subject_of


class Letters(SyntheticReviews, name="letters", has_grammar=True, complete_texts=True):
    """A task in which untrained policies differ."""

    def gold(self, text: str) -> float:
        return sum(ord(letter) for letter in text) / 700


WORLD = Letters()
PROMPTS = SyntheticReviews().prompts(HELD_OUT, 4, seed=0)


@pytest.fixture
def subject(policy, tmp_path) -> EvalContext:
    """Whose second prompt comes twice."""
    return subject_of(policy, policy, [*PROMPTS[:2], PROMPTS[1], *PROMPTS[2:]], cache=tmp_path / "cache", task=WORLD)


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """How many samples each sampling made, as it makes them."""
    made: list[int] = []
    real = sampling.generate_responses

    def counted(model, encoder, prompts, **how):
        made.append(len(prompts))
        return real(model, encoder, prompts, **how)

    monkeypatch.setattr(sampling, "generate_responses", counted)
    return made


def kept(subject: EvalContext) -> Path:
    (path,) = (subject.cache or Path()).glob("candidates-*.json")
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_some_is_the_mean_over_all_choices(n):
    values = np.array([[3.0, -1.0, 2.0, 2.0, 7.0], [0.0, 1.0, 0.5, -4.0, 9.0]])
    by_hand = [np.mean([max(chosen) for chosen in itertools.combinations(row, n)]) for row in values]
    assert best_of(values, n).tolist() == pytest.approx(by_hand)


def test_the_best_of_some_is_unbiased():
    """Of standard normal draws, 16 a prompt: the highest of 4 is 1.02938 on the average, of 16 1.76599."""
    values = np.random.default_rng(0).standard_normal((20_000, 16))
    assert best_of(values, 4).mean() == pytest.approx(1.02938, abs=0.01)
    assert best_of(values, 16).mean() == pytest.approx(1.76599, abs=0.015)


def test_what_is_kept_of_candidates(subject, sampled, tmp_path):
    """Each of the distinct prompts has the gold rewards of its own responses; what the figures say can be made from them."""
    metrics = dict(Optimum(num_candidates=6, num_prompts=3).run(subject))
    assert sampled == [18]
    subject.examples.write(tmp_path / EXAMPLES)
    rows = read(tmp_path / EXAMPLES)["candidates"]
    assert list(rows) == [subject.prompt_keys[place] for place in (0, 1, 3)]
    texts = json.loads(kept(subject).read_text())
    for prompt, responses, row in zip(PROMPTS, texts, rows.values(), strict=False):
        assert row["gold"] == [round(WORLD.gold(prompt + response), 4) for response in responses]
    gold = np.array([row["gold"] for row in rows.values()])
    assert gold.std() > 0
    best = [np.mean([max(chosen) for chosen in itertools.combinations(row, 4)]) for row in gold]
    assert set(metrics) == {"best_of_4/gold", "best_of_4/gold_gain"}  # of 16 there are not enough
    assert metrics["best_of_4/gold"].value == pytest.approx(np.mean(best), abs=1e-4)
    assert metrics["best_of_4/gold"].n == 3
    gain = (np.mean(best) - gold.mean()) / gold.std()
    assert metrics["best_of_4/gold_gain"].value == pytest.approx(gain, abs=1e-3)


def test_a_judge_scores_them_where_no_truth_is_known(subject):
    subject.task, subject.judge = None, Scorer(lambda texts: np.array([float(len(text)) for text in texts]))
    assert set(dict(Optimum(4, 2).run(subject))) == {"best_of_4/judge", "best_of_4/judge_gain"}
    assert [list(row) for row in subject.examples.rows()] == [["kind", "key", "judge"]] * 2


def test_without_a_reward_nothing_is_sampled(subject, sampled):
    subject.task = None
    assert list(Optimum(4, 2).run(subject)) == []
    assert sampled == []


def rewards(subject: EvalContext, candidates: int = 4, prompts: int = 2) -> list[list[float]]:
    return subject.candidate_rewards(prompts, candidates)[1]["gold"].tolist()


def test_runs_that_start_from_one_policy_sample_once(subject, sampled):
    first = rewards(subject)
    other = replace(subject, trained=perturbed(subject.initial, 0.1), tokens=32)  # another run of the same seed
    assert rewards(other) == first
    assert sampled == [8]
    assert rewards(replace(subject, cache=None)) == first  # what is kept is what would be sampled
    assert sampled == [8, 8]


@pytest.mark.parametrize(
    "changed",
    [
        lambda s: replace(s, seed=1),
        lambda s: replace(s, max_new_tokens=9),
        lambda s: replace(s, initial=perturbed(s.initial, 1e-3)),
        lambda s: replace(s, prompt_ids=s.prompt_ids[1:], prompts=s.prompts[1:]),
        lambda s: replace(s, context=lambda: torch.autocast("cpu", torch.bfloat16)),
        lambda s: replace(s, encoder=replace(s.encoder, append_eos=False)),
    ],
)
def test_what_would_change_a_sample_is_sampled_anew(changed, subject, sampled):
    rewards(subject)
    rewards(changed(subject))
    assert sampled == [8, 8]
    assert len(list(subject.cache.glob("candidates-*.json"))) == 2


@pytest.mark.parametrize("damage", ["cut", "another text", "no object"])
def test_a_file_that_does_not_hold_what_it_should_is_made_anew(damage, subject, sampled, caplog):
    first, whole = rewards(subject), kept(subject).read_text()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "another text": whole.replace('[["', '[["x'),
        "no object": "[]",
    }[damage]
    assert damaged != whole
    kept(subject).write_text(damaged)
    with caplog.at_level("WARNING", logger="dpo_lab"):
        assert rewards(subject) == first
    assert sampled == [8, 8]
    assert "it is created again" in caplog.text
    assert kept(subject).read_text() == whole


def test_runs_at_the_same_time_sample_once(subject, sampled):
    """The lock is a file's, held as by two processes: each call opens it anew."""
    runs = [replace(subject, examples=type(subject.examples)()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rewards, runs))
    assert sampled == [8]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("settings", "key"), [({"num_candidates": 1}, "num_candidates"), ({"num_prompts": 0}, "num_prompts")]
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(ValueError, match=f"evals.optimum.{key}=.*; type e.g. evals.optimum.{key}=128"):
        Optimum(**settings)
