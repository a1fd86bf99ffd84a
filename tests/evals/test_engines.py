"""Generation engines: the exact one is the sampler, transformers' batches are of the policy's distribution, vLLM's contract."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.evals.engines import ENGINES, Engine, EngineError, Request
from dpo_lab.evals.engines.continuous import Continuous
from dpo_lab.evals.engines.exact import Exact
from dpo_lab.evals.engines.vllm import VLLM
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.optimum import Optimum
from dpo_lab.models.adapters import with_fresh_adapters
from dpo_lab.models.policy import Lora, Policy, Pretrained
from dpo_lab.models.sampling import generate_responses
from tests.evals.test_evals import evaluate, perturbed, subject_of
from tests.support.configs import composed, recorded, settled


@pytest.fixture
def subject(policy):
    return subject_of(perturbed(policy, 0.05), policy, SyntheticReviews().prompts(HELD_OUT, 6, seed=0))


def drawn(engine: Engine, policy: Policy, encoder, prompts, **settings):
    settings = dict(max_new_tokens=8, seed=3, batch_size=4, what="Samples") | settings
    return engine.generate(Request(policy, encoder, prompts, **settings))


def test_the_exact_engine_is_the_sampler(subject):
    settings = dict(max_new_tokens=8, seed=derive_seed(0, "evaluation/trained"), batch_size=4, what="Samples")
    expected = generate_responses(subject.trained.model, subject.encoder, subject.prompt_ids, **settings)
    assert subject.samples == expected
    assert [s.logps for s in subject.samples] == [s.logps for s in expected]


def test_continuous_batching_draws_from_the_policys_distribution(subject):
    """First tokens of 600 samples of one prompt, by chance of each: Pearson's statistic; no top-k, no temperature."""
    policy, prompt = subject.trained, subject.prompt_ids[0]
    samples = drawn(Continuous(page_size=16), policy, subject.encoder, [prompt] * 600, max_new_tokens=1, batch_size=64)
    with torch.no_grad():
        logits = policy.model(torch.tensor([list(prompt)])).logits[0, -1].double()
    chances, counts = logits.softmax(-1).numpy(), Counter(sample.tokens[0] for sample in samples)
    order = np.argsort(chances)
    groups = np.array_split(order, 20)  # of tokens by their chance, so that the rare ones count too
    expected = np.array([chances[group].sum() for group in groups]) * 600
    observed = np.array([sum(counts[int(token)] for token in group) for group in groups])
    assert len(counts) > 60  # more than transformers' default top_k of 50
    assert ((observed - expected) ** 2 / expected).sum() < 43.8  # the 99.9th percentile of chi-squared with 19


def test_continuous_batching_ends_where_the_encoder_says_and_leaves_the_model_as_it_was(subject):
    policy, encoder = subject.trained, subject.encoder
    policy.model.train()
    attention = policy.model.config._attn_implementation
    end = encoder.eos_id
    with torch.no_grad():
        policy.model.lm_head.weight[end] *= 0  # logit 0: likely enough to be drawn within 30 tokens
    first, second = (drawn(Continuous(), policy, encoder, subject.prompt_ids, max_new_tokens=30) for _ in range(2))
    assert policy.model.training
    assert policy.model.config._attn_implementation == attention
    assert first == second  # by the seed
    assert first != drawn(Continuous(), policy, encoder, subject.prompt_ids, max_new_tokens=30, seed=4)
    for sample in first:
        assert end not in sample.tokens[:-1]
        assert sample.stopped == (sample.tokens[-1] == end)
        assert sample.stopped or len(sample.tokens) == 30
        assert sample.logps == ()
    policy.model.eval()


def test_log_probabilities_are_our_own_whatever_the_engine(subject):
    subject.engine = Continuous()
    metrics = evaluate(subject, [KL()])
    responses = [sample.tokens for sample in subject.samples]
    trained, initial = (
        subject.response_logps(policy.model, subject.prompt_ids, responses)[0].double()
        for policy in (subject.trained, subject.initial)
    )
    assert metrics["kl"].value == pytest.approx((trained - initial).mean().item())
    assert {len(sample.logps) for sample in subject.samples} == {0}


def test_candidates_of_engines_have_files_of_their_own(subject, tmp_path):
    subject.cache = tmp_path
    rewards = []
    for engine in (Exact(), Continuous()):
        subject.engine = engine
        evaluate(subject, [Optimum(num_candidates=2, num_prompts=2)])
        rewards.append(sorted(tmp_path.glob("candidates-*.json")))
    assert [len(files) for files in rewards] == [1, 2]


def test_an_attention_that_cannot_be_paged_is_one_line(subject, monkeypatch):
    def fail(*args, **settings):
        raise ValueError("no such kernel\nmore")

    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", fail)
    with pytest.raises(
        EngineError, match=r"^evals/engine=continuous: ValueError: no such kernel; type evals/engine=exact$"
    ):
        drawn(Continuous(), subject.trained, subject.encoder, subject.prompt_ids)
    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", lambda *args, **settings: {})
    with pytest.raises(EngineError, match=r"6 of 6 prompts got no response; type evals/engine=exact$"):
        drawn(Continuous(), subject.trained, subject.encoder, subject.prompt_ids)


class SamplingParams(SimpleNamespace):
    """vLLM's, of which any field may be given by name."""


class LLM:
    """What vLLM's documents say of LLM.generate: prompts of token ids and parameters for each, outputs in their order,
    whose tokens include the stop token. It says the last token of the prompt until an end token or max_tokens.
    """

    made: list[LLM] = []

    def __init__(self, model: str, **settings) -> None:
        self.weights = LlamaForCausalLM.from_pretrained(model).state_dict()
        self.settings = settings
        self.made.append(self)

    def generate(self, prompts, params, use_tqdm=True):
        assert len(prompts) == len(params)
        self.params, outputs = params, []
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            tokens = [prompt["prompt_token_ids"][-1]] * each.max_tokens
            if stops := i % 2 == 0:
                tokens = [*tokens[:2], each.stop_token_ids[0]]
            reason, stop = ("stop", each.stop_token_ids[0]) if stops else ("length", None)
            outputs.append(
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=tuple(tokens), finish_reason=reason, stop_reason=stop)]
                )
            )
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in of vLLM, importable, on a machine that says it has a GPU."""
    module = ModuleType("vllm")
    module.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    LLM.made.clear()


def test_vllm_gets_the_weights_and_the_settings_of_every_engine(subject, vllm):
    samples = drawn(VLLM(memory=0.3), subject.trained, subject.encoder, subject.prompt_ids)
    (llm,) = LLM.made
    for name, weight in subject.trained.model.state_dict().items():
        assert torch.equal(llm.weights[name], weight)
    assert llm.settings["gpu_memory_utilization"] == 0.3
    assert llm.settings["generation_config"] == "vllm"
    assert llm.settings["max_model_len"] == max(map(len, subject.prompt_ids)) + 8
    for params in llm.params:
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 8)
        assert params.stop_token_ids == list(subject.encoder.end_ids)
        assert params.ignore_eos
    assert len({params.seed for params in llm.params}) == len(samples)
    last = [int(prompt[-1]) for prompt in subject.prompt_ids]
    end = subject.encoder.end_ids[0]
    assert [s.tokens for s in samples] == [(t, t, end) if i % 2 == 0 else (t,) * 8 for i, t in enumerate(last)]
    assert [s.stopped for s in samples] == [i % 2 == 0 for i in range(len(samples))]


@pytest.mark.filterwarnings("ignore")  # of peft
def test_vllm_gets_adapters_merged(subject, vllm):
    pytest.importorskip("peft")
    settings = Pretrained(path="any", lora=Lora(r=2, target_modules=["q_proj"]))
    adapted = with_fresh_adapters(perturbed(subject.initial, 0.0).model, settings, seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    drawn(VLLM(), Policy(adapted, subject.initial.tokenizer), subject.encoder, subject.prompt_ids)
    (llm,) = LLM.made
    initial = subject.initial.model.state_dict()
    assert {name.split(".")[-2] for name in initial if not torch.equal(initial[name], llm.weights[name])} == {"q_proj"}
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], llm.weights[name]) for name in merged)


def test_vllm_is_refused_in_one_line_before_training(vllm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"^evals/engine=vllm: needs a GPU; type evals/engine=continuous$"):
        settled("evals/engine=vllm").evals.check()
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("dpo_lab.evals.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(
        EngineError, match=r"needs vLLM; type pip install 'dpo_lab\[vllm\]', or evals/engine=continuous$"
    ):
        settled("evals/engine=vllm").evals.check()
    settled("evals/engine=vllm", "evals.evaluators=[preference]").evals.check()  # nothing is sampled


def test_what_vllm_raises_is_one_line(subject, vllm, monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("CUDA error: out\nof memory")

    monkeypatch.setattr(LLM, "generate", fail)
    with pytest.raises(EngineError, match=r"^evals/engine=vllm: RuntimeError: CUDA error: out; type evals/engine=cont"):
        drawn(VLLM(), subject.trained, subject.encoder, subject.prompt_ids)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_each_engine_is_a_choice_with_its_settings(name):
    assert recorded(f"evals/engine={name}")["evals"]["engine"]["kind"] == name
    assert isinstance(settled(f"evals/engine={name}").evals.engine, ENGINES[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evals/engine=continuous", "evals.engine.page_size=2"], r"evals\.engine\.page_size=2: must be 4 or more"),
        (["evals/engine=continuous", "evals.engine.memory=1"], r"evals\.engine\.memory=1\.0: must be between 0 and 1"),
        (["evals/engine=vllm", "evals.engine.memory=0"], r"evals\.engine\.memory=0\.0: must be between 0 and 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(Exception, match=message):
        settled(*settings)
    assert composed("evals/engine=exact").evals.engine == {}
