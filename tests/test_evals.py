"""Evaluators: against enumeration, hand-made texts and each other; samples are made once."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tokenize import Encoder
from dpo_lab.data.world.embedded import Embedded
from dpo_lab.evals import subject as subject_module
from dpo_lab.evals.evaluation import evaluate
from dpo_lab.evals.kl import KL
from dpo_lab.evals.language import distinct, perplexity
from dpo_lab.evals.preference import Preference
from dpo_lab.evals.reward import GoldReward
from dpo_lab.evals.subject import Subject
from dpo_lab.models.policy import Policy
from dpo_lab.models.sampling import Sample
from tests.conftest import make_pairs


def perturbed(policy: Policy, scale: float) -> Policy:
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return Policy(model, policy.tokenizer)


def subject_of(trained: Policy, initial: Policy, prompts: list[str], **changes) -> Subject:
    encoder = Encoder(initial.tokenizer, 64, 32)
    begin = encoder.prompt("")
    settings = dict(
        trained=trained,
        initial=initial,
        encoder=encoder,
        pairs=make_pairs(9),
        prompts=prompts,
        prompt_ids=[encoder.prompt(prompt) for prompt in prompts],
        texts=[(begin, encoder.response(text, begin)) for text in Embedded().reviews(HELD_OUT, 5, seed=0)],
        world=Embedded(),
        max_new_tokens=8,
        tokens=64,
        batch_size=4,
        seed=0,
    )
    return Subject(**(settings | changes))


@pytest.fixture
def subject(policy) -> Subject:
    return subject_of(perturbed(policy, 0.05), policy, Embedded().prompts(HELD_OUT, 6, seed=0))


def test_samples_are_made_once(subject, monkeypatch):
    calls = []
    real = subject_module.respond
    monkeypatch.setattr(subject_module, "respond", lambda *a, **k: calls.append(1) or real(*a, **k))
    metrics = evaluate(subject)
    assert len(calls) == 2  # one set of the trained policy, one of the initial
    assert {"accuracy", "true_accuracy", "kl", "gold", "win_rate", "perplexity", "well_formed", "length"} <= set(
        metrics
    )


def test_the_initial_policy_against_itself(policy):
    metrics = evaluate(subject_of(policy, policy, Embedded().prompts(HELD_OUT, 6, seed=0)))
    assert metrics["kl"].value == 0
    assert metrics["accuracy"].value == 0.5
    assert metrics["true_accuracy"].value == 0.5
    assert metrics["margin"].value == 0
    assert metrics["chosen_fell"].value == 0
    assert metrics["perplexity"] == metrics["initial/perplexity"]


def test_kl_against_enumeration():
    """Vocabulary of 5 with an end token, responses of at most 3 tokens: the exact KL lies within 3 standard errors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=2
    )
    initial, trained = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    with torch.no_grad():
        trained.lm_head.weight *= 30  # far enough apart to be worth measuring
        initial.lm_head.weight *= 30

    class Tokenizer:
        eos_token_id, pad_token_id, bos_token_id = 1, 2, None

        chat_template = None

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[3, 4] for _ in texts] if isinstance(texts, list) else [3, 4]}

    subject = subject_of(
        Policy(trained, Tokenizer()),
        Policy(initial, Tokenizer()),
        ["any"] * 4000,
        encoder=Encoder(Tokenizer(), 16, 8),
        max_new_tokens=3,
        batch_size=500,
    )
    responses = [
        r for n in (1, 2, 3) for r in product(range(5), repeat=n) if 1 not in r[:-1] and (r[-1] == 1 or n == 3)
    ]
    of_trained, _ = subject.response_logps(trained, [[3, 4]] * len(responses), responses)
    of_initial, _ = subject.response_logps(initial, [[3, 4]] * len(responses), responses)
    assert of_trained.exp().sum().item() == pytest.approx(1, abs=1e-5)  # the enumeration is complete
    exact = (of_trained.exp() * (of_trained - of_initial)).sum().item()
    metrics = dict(KL().run(subject))
    assert metrics["kl"].se is not None
    assert abs(metrics["kl"].value - exact) < 3 * metrics["kl"].se
    assert exact > 10 * metrics["kl"].se


def test_response_logps_do_not_depend_on_batches(subject):
    prompts, responses = subject.prompt_ids, [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5], [6, 6]]
    sums, lengths = subject.response_logps(subject.initial.model, prompts, responses)
    for i in range(len(prompts)):
        alone, _ = subject.response_logps(subject.initial.model, [prompts[i]], [responses[i]])
        assert sums[i].item() == pytest.approx(alone.item(), rel=1e-5)
    assert lengths.tolist() == [3, 1, 2, 4, 1, 2]


def test_perplexity_of_uniform_logits_is_the_vocabulary(subject):
    uniform = copy.deepcopy(subject.initial)
    with torch.no_grad():
        uniform.model.lm_head.weight.zero_()
    vocabulary = uniform.model.config.vocab_size
    assert perplexity(subject, uniform).value == pytest.approx(vocabulary, rel=1e-4)


def with_samples(subject: Subject, trained: list[str], initial: list[str]) -> Subject:
    """The subject with these texts as its samples, behind empty prompts."""
    subject.prompts = [""] * len(trained)
    eos = subject.encoder.tokenizer.eos_token_id

    def as_samples(texts):
        return [
            Sample((*subject.encoder.tokenizer(t, add_special_tokens=False)["input_ids"], eos), True) for t in texts
        ]

    subject.__dict__["samples"], subject.__dict__["initial_samples"] = as_samples(trained), as_samples(initial)
    return subject


def test_gold_reward_by_hand(subject):
    good, bad, fair = "The plot was superb.", "The plot was awful.", "The plot was odd."  # 3, -3, 0
    metrics = dict(GoldReward().run(with_samples(subject, [good, good, fair], [bad, good, fair])))
    assert metrics["gold"].value == pytest.approx(2)
    assert metrics["initial/gold"].value == pytest.approx(0)
    assert metrics["win_rate"].value == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert metrics["gold_gain"].value == pytest.approx(2 / math.sqrt(6))


def test_no_world_no_gold(subject):
    subject.world = None
    assert list(GoldReward().run(subject)) == []


def test_preference_by_hand(subject):
    trained, initial = subject.pair_logps
    margins = ((trained.chosen - initial.chosen) - (trained.rejected - initial.rejected)).tolist()
    truth = [p.gold_margin for p in subject.pairs]
    metrics = dict(Preference().run(subject))
    assert metrics["accuracy"].value == pytest.approx(sum(m > 0 for m in margins) / 9)
    known = [(m, t) for m, t in zip(margins, truth, strict=True) if not math.isnan(t)]
    assert metrics["true_accuracy"].n == len(known) == 7
    assert metrics["true_accuracy"].value == pytest.approx(sum(m * t > 0 for m, t in known) / len(known))


def test_distinct_by_hand():
    # bigrams: (a b) (b a) (a b) | (a b): 4, of which 2 differ
    assert distinct(["a b a b", "a b"], 2).value == pytest.approx(2 / 4)
