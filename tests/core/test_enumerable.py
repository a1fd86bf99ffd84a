"""KL, win rate and their intervals against brute force, where every response can be listed: up to 6 tokens of 5."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.language import Language
from dpo_lab.evals.evaluators.win_rate import WinRate
from dpo_lab.models.policy import Policy
from dpo_lab.stats.estimates import Estimate, mean, ratio

pytestmark = pytest.mark.slow

REPETITIONS, SAMPLES, LONGEST, END = 200, 150, 6, 1
RESPONSES = [
    r
    for n in range(1, LONGEST + 1)
    for r in product(range(5), repeat=n)
    if END not in r[:-1] and (r[-1] == END or n == LONGEST)
]
PLACE = {response: i for i, response in enumerate(RESPONSES)}
GOLD = np.array([r.count(0) - r.count(3) for r in RESPONSES], np.float64)  # many ties
LENGTHS = np.array([len(r) for r in RESPONSES])


class Tokenizer:
    eos_token_id, pad_token_id, bos_token_id, chat_template = END, 2, None, None

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[3, 4] for _ in texts] if isinstance(texts, list) else [3, 4]}


def made(seed: int) -> Policy:
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=2
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 15  # far enough from uniform, and from each other, to be worth measuring
    return Policy(model, Tokenizer())  # type: ignore[arg-type]


def subject_of(trained: Policy, initial: Policy, prompts: int) -> EvalContext:
    encoder = PairTokenizer(Tokenizer(), 16, 8)  # type: ignore[arg-type]
    ids = [[3, 4]] * prompts
    settings = dict(max_new_tokens=LONGEST, tokens=8192, batch_size=4096, seed=5)
    return EvalContext(trained, initial, encoder, [], [""] * prompts, ids, [], None, **settings)


@pytest.fixture(scope="module")
def whole() -> EvalContext:
    """All samples of all repetitions at once, made and scored by the subject, and worth what GOLD says."""
    subject = subject_of(made(1), made(2), REPETITIONS * SAMPLES)
    both = (subject.samples, subject.initial_samples)
    subject.__dict__["rewards"] = {"gold": tuple(GOLD[[PLACE[s.tokens] for s in samples]] for samples in both)}
    return subject


@pytest.fixture(scope="module")
def exact(whole) -> dict[str, float]:
    """What every estimate is of, by enumeration."""
    ids = [[3, 4]] * len(RESPONSES)
    p, q = (
        np.exp(whole.response_logps(policy.model, ids, RESPONSES)[0].double().numpy())
        for policy in (whole.trained, whole.initial)
    )
    assert [p.sum(), q.sum()] == pytest.approx([1, 1], abs=1e-5)  # the list is complete
    wins = (np.sign(GOLD[:, None] - GOLD[None, :]) + 1) / 2
    kl = float(p @ np.log(p / q))
    return {
        "kl": kl,
        "kl_per_token": kl / float(p @ LENGTHS),
        "win_rate": float(p @ wins @ q),
        "entropy": float(-(p @ np.log(p)) / (p @ LENGTHS)),
        "length": float(p @ LENGTHS),
    }


def repetition(whole: EvalContext, number: int) -> dict[str, Estimate]:
    """What the evaluators say of one repetition's samples alone."""
    rows = slice(number * SAMPLES, (number + 1) * SAMPLES)
    part = subject_of(whole.trained, whole.initial, SAMPLES)
    part.__dict__ |= {
        "samples": whole.samples[rows],
        "initial_samples": whole.initial_samples[rows],
        "sample_logps": tuple(logps[rows] for logps in whole.sample_logps),
        "rewards": {"gold": tuple(gold[rows] for gold in whole.rewards["gold"])},
    }
    return dict(KL().run(part)) | dict(WinRate().run(part))


def test_an_estimate_lies_within_three_standard_errors(whole, exact):
    found = dict(KL().run(whole)) | dict(WinRate().run(whole))
    own, tokens = whole.sample_logps[0], [len(s.tokens) for s in whole.samples]
    found |= {"entropy": ratio(-own, tokens), "length": mean(tokens)}  # as Language has them
    for name, value in exact.items():
        estimate = found[name]
        assert estimate.se is not None
        assert abs(estimate.value - value) < 3 * estimate.se, name
        assert estimate.se < 0.01 * value, name  # it was a test


def test_language_has_them_so(whole):
    part = subject_of(whole.trained, whole.initial, 64)
    part.encoder.text = lambda tokens: " ".join(map(str, tokens))  # type: ignore[method-assign]
    found = dict(Language().run(part))
    tokens = [len(s.tokens) for s in part.samples]
    assert found["entropy"] == ratio(-part.sample_logps[0], tokens)
    assert found["length"] == mean(tokens)
    assert "perplexity" not in found  # no texts


@pytest.fixture(scope="module")
def repeated(whole) -> list[dict[str, Estimate]]:
    return [repetition(whole, number) for number in range(REPETITIONS)]


@pytest.mark.parametrize("name", ["kl", "kl_per_token", "win_rate"])
def test_the_interval_covers_what_it_says(name, exact, repeated):
    intervals = [found[name].interval for found in repeated]
    covered = np.mean([low <= exact[name] <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.98
    errors = np.array([found[name].value - exact[name] for found in repeated])
    said = np.array([found[name].se for found in repeated])
    assert np.sqrt(np.mean(said**2)) == pytest.approx(errors.std(), rel=0.15)  # the standard error is the spread
