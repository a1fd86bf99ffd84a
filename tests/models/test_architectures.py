"""Every architecture against a brute force, row by row: log-probabilities and samples are right, or the model is refused."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from dpo_lab.data.collate import collate_responses
from dpo_lab.models.decoding import sample_without_cache, uses_cache
from dpo_lab.models.forward import response_logps, select_forward
from dpo_lab.models.probes import behaviour_of
from dpo_lab.models.sampling import draw, sample
from tests.support.architectures import BIDIRECTIONAL, CACHED, UNCACHED, made
from tests.support.path_table import PADDED, PAGE, alone, log_probability, measure, rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about their own kernels and settings
NEW_TOKENS = 6


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Without the libraries' hints about kernels that are not installed."""
    logger = logging.getLogger("transformers")
    was, logger.level = logger.level, logging.ERROR
    yield
    logger.level = was


@torch.no_grad()
def brute_samples(model: Any, prompts: list[list[int]], seed: int) -> list[tuple[int, ...]]:
    uniforms = torch.rand(len(prompts), NEW_TOKENS, generator=torch.Generator().manual_seed(seed))
    found = []
    for prompt, numbers in zip(prompts, uniforms, strict=True):
        ids = list(prompt)
        for number in numbers:
            ids.append(int(draw(alone(model, ids)[-1:], number[None])[0]))
            if ids[-1] in END_IDS:
                break
        found.append(tuple(ids[len(prompt) :]))
    return found


END_IDS = tuple(range(2, 22))  # a fifth of all tokens end a response, so that rows leave the batch


@pytest.mark.parametrize("name", [*CACHED, *UNCACHED])
def test_it_is_right(name):
    model = made(*(CACHED | UNCACHED)[name], scale=3.0)
    original = copy.deepcopy(model)
    select_forward(model)
    behaviour = behaviour_of(model)
    assert behaviour.refused is None
    assert (behaviour.uncached is None) == (name in CACHED), behaviour.uncached
    if behaviour.uncached is not None:
        sample_without_cache(model)
    prompts, responses = zip(*rows(), strict=True)
    with torch.no_grad():
        found = response_logps(model, *collate_responses(prompts, responses))[:, 0]
    expected = [log_probability(original, prompt, response) for prompt, response in rows()]
    assert found.tolist() == pytest.approx(expected, abs=2e-4, rel=1e-5)
    sampled = sample(model, prompts, max_new_tokens=NEW_TOKENS, end_ids=END_IDS, pad_id=0, seed=1)
    assert [s.tokens for s in sampled] == brute_samples(original, list(prompts), seed=1)


@pytest.mark.parametrize("name", [*CACHED, *UNCACHED])
def test_its_path_is_that_of_the_table(name):
    """Where a chunk of logits is all that is held, no operator of a forward and backward pass returns more rows."""
    found = measure(name)
    *columns, bound, reason = found.line.split(" | ")
    (listed,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    *listed_columns, listed_bound, listed_reason = listed.split(" | ")
    assert (columns, reason) == (listed_columns, listed_reason)
    assert found.difference <= 10 * float(listed_bound), bound
    assert found.held <= 4 or found.held == PADDED


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_attention_to_later_tokens_is_refused(name):
    refused = behaviour_of(made(*BIDIRECTIONAL[name])).refused
    assert refused is not None
    assert "bidirectional" in refused


@pytest.mark.parametrize("name", ["Llama", "Qwen3 MoE", "Mamba", "RoBERTa, decoder", "BERT", "XLNet"])
def test_rounding_of_bfloat16_is_no_fault_and_hides_none(name):
    model = made(*(CACHED | UNCACHED | BIDIRECTIONAL)[name], scale=3.0).to(torch.bfloat16)
    behaviour = behaviour_of(model)
    assert (behaviour.refused is not None) == (name in BIDIRECTIONAL)
    assert (behaviour.uncached is not None) == (name in UNCACHED)


def test_a_copy_samples_as_the_model_does():
    model = made(*UNCACHED["Mamba"])
    assert uses_cache(model)
    sample_without_cache(model)
    assert not uses_cache(copy.deepcopy(model))
