"""A third policy: against itself, by hand, by a judge, with a tokenizer of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpo_lab.data.splits import HELD_OUT, TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.evaluate import Evals, evaluate
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.language import Language
from dpo_lab.evals.evaluators.reward import Reward
from dpo_lab.evals.evaluators.third import Third
from dpo_lab.evals.judges import Comparer, Scorer
from dpo_lab.evals.third_policy import ThirdPolicy
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.models.tokenizer import train_tokenizer
from dpo_lab.runs.examples import Examples
from tests.evals.test_evals import perturbed, subject_of

PROMPTS = SyntheticReviews().prompts(HELD_OUT, 12, seed=0)


def against(trained: Policy, third: Policy, initial: Policy, **changes):
    subject = subject_of(trained, initial, PROMPTS, **changes)
    return replace(subject, third=ThirdPolicy(third, subject.encoder, subject.prompt_ids, True), examples=Examples())


def test_the_trained_policy_against_itself_differs_in_nothing(policy):
    trained = perturbed(policy, 0.05)
    subject = against(trained, trained, policy)
    metrics = evaluate(subject, [KL(), Language(), Reward(), Third()])
    assert subject.third_samples == subject.samples
    differences = {name: m.value for name, m in metrics.items() if name.endswith("_difference")}
    assert differences.keys() == {f"third/{n}_difference" for n in ("gold", "kl", "length", "stopped", "well_formed")}
    assert set(differences.values()) == {0}
    assert metrics["third/win_rate"].value == 0.5
    for name in ("gold", "kl", "length", "stopped", "well_formed"):
        assert metrics[f"third/{name}"].value == metrics[name].value


def test_the_initial_policy_as_third_has_no_divergence(policy):
    metrics = evaluate(against(perturbed(policy, 0.05), policy, policy), [Third()])
    assert metrics["third/kl"].value == 0
    assert metrics["third/kl_difference"].value > 0


def test_differences_are_paired_by_prompt(policy):
    subject = against(perturbed(policy, 0.05), perturbed(policy, 0.1), policy)
    subject.judge = Scorer(lambda texts: np.array([float(len(text)) for text in texts]))
    metrics = evaluate(subject, [Reward(), Third()])
    rows = {row["key"]: row for row in subject.examples.rows() if row["kind"] == "prompt"}
    assert len(rows) == len(PROMPTS)
    for name in ("gold", "judge"):
        apart = [row[name] - row[f"third/{name}"] for row in rows.values()]
        estimate = metrics[f"third/{name}_difference"]
        assert estimate.value == pytest.approx(np.mean(apart))
        if name == "judge":  # samples of random weights have no gold
            assert estimate.se == pytest.approx(np.std(apart, ddof=1) / np.sqrt(len(apart)))
    wins = [np.heaviside(row["judge"] - row["third/judge"], 0.5) for row in rows.values()]
    assert metrics["third/judge_win_rate"].value == pytest.approx(np.mean(wins))
    shown = subject.side_by_side[0]
    assert set(shown) == {"prompt", "initial", "trained", "third"}
    assert next(iter(rows.values()))["third_response"] == shown["third"]


def test_a_judge_that_compares_is_asked_in_both_orders(policy):
    subject = against(perturbed(policy, 0.05), perturbed(policy, 0.2), policy, task=None)
    subject.judge = Comparer(lambda questions: [0.9] * len(questions), lambda *texts: "|".join(texts))
    metrics = evaluate(subject, [Third()])
    assert metrics["third/judge_win_rate"].value == 0.5  # always the first: the orders contradict each other
    assert metrics["third/judge_first"].value == 1
    assert "third/win_rate" not in metrics


def test_a_tokenizer_of_its_own_has_no_divergence_and_lengths_of_ours(policy):
    tokenizer = train_tokenizer(SyntheticReviews().texts(TRAIN, 40, seed=1), vocab_size=300)
    tiny = TinyPolicy(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=256)
    third = Policy(tiny.build(tokenizer, seed=1).eval(), tokenizer)
    subject = subject_of(perturbed(policy, 0.05), policy, PROMPTS)
    own = PairTokenizer(tokenizer, 64, 32)
    ids = [own.prompt(prompt) for prompt in PROMPTS]
    subject.third = ThirdPolicy(third, own, ids, shares_tokens=False)
    metrics = evaluate(subject, [Reward(), Third()])
    assert "third/kl" not in metrics
    assert "third/gold_difference" in metrics
    lengths = [
        len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) + sample.stopped
        for text, sample in zip(subject.third_responses, subject.third_samples, strict=True)
    ]
    assert metrics["third/length"].value == pytest.approx(np.mean(lengths))
    assert subject.third_responses == [own.text(sample.tokens) for sample in subject.third_samples]


def test_what_is_measured_on_a_file_of_prompts_names_it():
    labels = labels_of(
        ["gold", "gold_gain", "kl", "kl_forward_text", "perplexity", "third/win_rate", "accuracy"], "my.txt"
    )
    assert labels["gold"] == "gold reward, my.txt"
    assert labels["gold_gain"] == "  gain, in sd of initial"
    assert labels["third/win_rate"] == "win rate against third, gold, my.txt"
    assert labels["perplexity"] == "perplexity of real text"
    assert labels["kl_forward_text"] == "log-prob lost per text (nats)"
    assert labels["accuracy"] == "accuracy, labels (held-out)"


def test_it_runs_whenever_a_third_policy_is_named():
    assert not any(isinstance(each, Third) for each in Evals().selected())
    assert any(isinstance(each, Third) for each in Evals(third="folder").selected())
    assert Evals(evaluators=["preference"], third="folder").uses_judge
