"""Pairs with one side, of responses labelled on their own: every forward path against one row a response, in float64."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf

from dpo_lab.core.losses import BCO
from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps
from dpo_lab.data.collate import collate
from dpo_lab.models import attention
from dpo_lab.models.attention import Segments
from dpo_lab.models.forward import pair_logps, pair_loss, select_forward
from dpo_lab.models.varlen import Layout, varlen_attention
from tests.support import varlen

V = 61
LENGTHS = [(5, 0, 9), (3, 4, 6), (7, 2, 0), (1, 0, 1), (20, 1, 0), (4, 8, 3)]  # prompt, chosen, rejected
ALONE = [[(5, 0, 9)], [(7, 2, 0)], [(5, 0, 9), (4, 0, 2)], [(7, 2, 0), (1, 1, 0)], LENGTHS]
CONFIGS = {
    "llama": hf.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


def batch_of(lengths) -> PairBatch:
    rng = random.Random(0)
    parts = ([[rng.randrange(3, V) for _ in range(n)] for n in item] for item in lengths)
    return collate([EncodedPair(f"{i}", *each) for i, each in enumerate(parts)])


def model_of(name: str):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").double().eval()


def one_by_one(model, batch: PairBatch) -> torch.Tensor:
    """[B, 2]: each response after its prompt, in a forward pass of its own; 0 where there is none."""
    sums, parts = [], iter(batch.tokens.split(batch.lengths.ravel().tolist()))
    for _ in range(len(batch)):
        prompt, *sides = next(parts), next(parts), next(parts)
        for side in sides:
            if not len(side):
                sums.append(torch.zeros((), dtype=torch.float64))
                continue
            logps = model(torch.cat((prompt, side))[None]).logits[0].log_softmax(-1)
            sums.append(logps[len(prompt) - 1 : -1].gather(1, side[:, None]).sum())
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("path", ["padded", "shared", "kernel"])
@pytest.mark.parametrize("lengths", ALONE)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_scores_the_responses_that_there_are(name, lengths, path, monkeypatch):
    model, batch = model_of(name), batch_of(lengths)
    expected = one_by_one(model, batch)
    zero = PairLogps.of(torch.zeros_like(expected), batch.response_lengths)
    BCO()(PairLogps.of(expected, batch.response_lengths), zero).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if path != "padded":
        select_forward(model)
    varlen.CALLS.clear()
    if path == "kernel":
        monkeypatch.setattr(attention, "supports", lambda *_: True)
    with torch.no_grad():
        found = pair_logps(model, batch)
    loss, policy = pair_loss(model, batch, BCO(), zero)
    loss.backward()
    assert bool(varlen.CALLS) == (path == "kernel")
    for logps in (found, policy):
        assert torch.allclose(torch.stack((logps.chosen, logps.rejected), 1), expected.detach(), rtol=0, atol=1e-12)
    most = 1e-6 if name == "llama" else 1e-9  # Llama's normalisation is in float32
    for ours, theirs in zip((p.grad for p in model.parameters()), gradients, strict=True):
        assert (ours - theirs).abs().max() <= most * theirs.abs().max()


def test_a_layout_has_no_sequence_of_a_response_that_there_is_not():
    layout = Layout.of([[2, 1, 0], [1, 0, 2]], torch.device("cpu"))
    assert layout.cu_q.tolist() == [0, 3, 4, 6]
    assert layout.cu_k.tolist() == [0, 3, 4, 7]
    assert layout.rows.tolist() == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("lengths", ALONE)
def test_the_kernel_gives_the_loops_numbers(lengths):
    torch.manual_seed(0)
    total = sum(map(sum, lengths))
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected, _ = attention.shared_prompt_attention(torch.nn.Module(), q, k, v, None, Segments(lengths))
    found = varlen_attention(q, k, v, Layout.of(lengths, torch.device("cpu")), None)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
