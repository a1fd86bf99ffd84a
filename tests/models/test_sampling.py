"""Sampling: the right distribution, independent of batching, and the same as a loop without a cache."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from dpo_lab.models.sampling import Sample, draw, sample

PROMPTS = [[5], [6, 7, 8], [9, 10], [11, 12, 13, 14, 15], [5, 6]]
SETTINGS = dict(max_new_tokens=12, end_ids=(1, 7), pad_id=2, seed=3)


def without_cache(model, prompts, max_new_tokens, end_ids, pad_id, seed) -> list[Sample]:
    """The same draws, one prompt at a time, the whole text anew for every token."""
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    samples = []
    for prompt, row in zip(prompts, uniforms, strict=True):
        tokens: list[int] = []
        for u in row:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[:, -1]
            tokens.append(int(draw(logits, u[None])[0]))
            if tokens[-1] in end_ids:
                break
        samples.append(Sample(tuple(tokens), tokens[-1] in end_ids))
    return samples


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    small = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval(),
        "sliding": MistralForCausalLM(MistralConfig(**small, num_key_value_heads=1, sliding_window=4)).eval(),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", ["policy", "gpt2", "sliding"])
def test_same_as_without_cache_and_batches(name, batch_size, policy):
    model = policy.model if name == "policy" else models()[name]
    expected = without_cache(model, PROMPTS, **SETTINGS)
    assert sample(model, PROMPTS, **SETTINGS, batch_size=batch_size) == expected


@pytest.mark.parametrize("batch_size", [4, 9])
@pytest.mark.parametrize("name", ["policy", "gpt2", "sliding"])
def test_same_where_equal_prompts_are_read_once(name, batch_size, policy):
    """Also where a batch ends among the rows of a prompt."""
    model = policy.model if name == "policy" else models()[name]
    prompts = [prompt for prompt in PROMPTS[1:4] for _ in range(3)]
    expected = without_cache(model, prompts, **SETTINGS)
    read = []
    hook = model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    found = sample(model, prompts, **SETTINGS, batch_size=batch_size, shares_prompts=True)
    hook.remove()
    assert found == expected
    assert len(read[0]) == (2 if batch_size == 4 else 3)


@pytest.mark.parametrize("name", ["policy", "gpt2", "sliding"])
def test_each_token_comes_with_its_log_probability(name, policy):
    model = policy.model if name == "policy" else models()[name]
    for prompt, found in zip(PROMPTS, sample(model, PROMPTS, **SETTINGS), strict=True):
        row = torch.tensor([[*prompt, *found.tokens]])
        with torch.no_grad():
            logps = model(input_ids=row).logits[0].log_softmax(-1)
        expected = logps[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "sliding"])
def test_rows_that_stop_early_leave_the_others_alone(name):
    """An end token made likely: rows end at different steps, and the last rows take their places in the batch."""
    model = models()[name]
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 4
    prompts = [[3 + i % 15] * (1 + i % 4) for i in range(24)]
    samples = sample(model, prompts, **SETTINGS)
    assert samples == without_cache(model, prompts, **SETTINGS)
    assert len({len(s.tokens) for s in samples}) > 3
    assert {s.stopped for s in samples} == {True, False}


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -30.0]])
    count = 40_000
    drawn = Counter(
        draw(logits.expand(count, -1), torch.rand(count, generator=torch.Generator().manual_seed(0)))[0].tolist()
    )
    for token, p in enumerate(logits[0].softmax(0).tolist()):
        assert drawn[token] / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count) + 1e-9)


def test_draws_at_the_edges():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert draw(logits, torch.tensor([0.0]))[0].item() == 1
    assert draw(logits, torch.tensor([1 - 2**-24]))[0].item() == 2


def test_train_mode_is_left_as_it_was(policy):
    policy.model.train()
    sample(policy.model, PROMPTS[:1], **SETTINGS)
    assert policy.model.training
    policy.model.eval()


def test_progress_counts_every_prompt(policy):
    done: list[int] = []
    sample(policy.model, PROMPTS, **SETTINGS, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]
