"""Shared prompts by padded products on the CPU, against the call per response and the definition; when they are used."""

from __future__ import annotations

import random

import pytest
import torch

from dpo_lab.models import attention
from dpo_lab.models.attention import Segments, attention_by_response, shared_prompt_attention
from dpo_lab.models.padded_attention import Padding, are_short, padded_attention
from tests.models.test_varlen import HEADS, assert_equal, by_definition, draw_inputs, draw_lengths


def by_padding(inputs, lengths, scale=None, window=None):
    return padded_attention(*inputs, Padding.of(lengths), scale, window)


def attend(inputs, lengths, **settings):
    return shared_prompt_attention(torch.nn.Module(), *inputs, None, segments=Segments(lengths), **settings)[0]


def test_a_padding_repeats_each_prompt_as_keys_of_its_later_responses():
    padding = Padding.of([[2, 1, 3], [7, 2, 1]])
    assert padding.shapes == [(1, 16), (3, 8)]  # the longest first
    first, *others = padding.rows.split([16, 8, 8, 8])
    assert first.tolist() == [*range(6, 15), *[0] * 7]
    assert [each.tolist() for each in others] == [
        [*range(6, 13), 15],
        [0, 1, 3, 4, 5, 0, 0, 0],
        [0, 1, 2, 0, 0, 0, 0, 0],
    ]
    assert padding.rows[padding.back].tolist() == [*range(16)]
    queries = {*range(9), 16 + 7, 24 + 2, 24 + 3, 24 + 4, 32, 33, 34}
    assert {*padding.back.tolist()} == queries
    assert {*padding.unused.tolist()} == {*range(40)} - queries
    assert padding.places[:2].tolist() == [24, 32]  # row 0 is a key of both responses of its item, and no other's
    assert padding.starts[:3].tolist() == [0, 2, 4]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("responses", [1, 2, 3, 4])
def test_it_gives_the_numbers_of_a_call_per_response(responses, heads):
    """42 random layouts a case, 504 together."""
    draw = random.Random(f"{responses} {heads}")
    for _ in range(42):
        lengths = draw_lengths(draw, responses)
        inputs = draw_inputs(lengths, HEADS[heads])
        scale = draw.choice([None, 0.5])
        ours, loop = (
            by_padding(inputs, lengths, scale),
            attention_by_response(*inputs, Segments(lengths), scale),
        )
        assert_equal(ours, loop, inputs)


@pytest.mark.parametrize("heads", HEADS)
def test_values_may_be_of_another_size(heads):
    """As those of multi-head latent attention are."""
    draw = random.Random(0)
    for responses in (1, 2, 4):
        lengths = draw_lengths(draw, responses)
        query, key, value = draw_inputs(lengths, HEADS[heads])
        inputs = query, key, value[..., : value.shape[-1] // 2].detach().clone().requires_grad_()
        assert_equal(by_padding(inputs, lengths), attention_by_response(*inputs, Segments(lengths), None), inputs)


@pytest.mark.parametrize("window", [1, 2, 6, 13, 100])
@pytest.mark.parametrize("responses", [1, 2, 4])
def test_a_sliding_window_reaches_back_into_the_prompt(responses, window):
    draw = random.Random(window)
    for heads in HEADS.values():
        lengths = draw_lengths(draw, responses)
        inputs = draw_inputs(lengths, heads)
        ours = by_padding(inputs, lengths, window=window)
        assert_equal(ours, by_definition(inputs, lengths, window - 1), inputs)


def test_short_sequences_of_small_heads_alone_are_padded(monkeypatch):
    def used(lengths, heads, head_size, **settings) -> bool:
        calls = []
        real = attention.padded_attention
        monkeypatch.setattr(attention, "padded_attention", lambda *args: calls.append(1) or real(*args))
        attend(draw_inputs(lengths, heads, torch.float32, head_size), lengths, **settings)
        monkeypatch.undo()
        return bool(calls)

    tiny, chat = [[5, 20, 20]] * 3, [[200, 150, 150]]
    assert used(tiny, (4, 4), 32)
    assert not used(tiny, (4, 4), 32, dropout=0.5)
    assert not used([[5, 40]] * 3, (4, 4), 32)
    assert not used(tiny, (9, 3), 128)
    assert not used(chat, (4, 4), 32)
    assert not are_short(tiny, torch.empty(1, 4, 45, 32, device="meta"))


@pytest.mark.parametrize("lengths", [[[5, 3, 4], [2, 6, 1]], [[90, 60, 70]]], ids=["padded", "by response"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32(dtype, lengths):
    """Outputs have the dtype of the values and are exact but for its rounding; gradients have their inputs' dtypes."""
    query, key, value = draw_inputs(lengths, (8, 4), torch.float32, 64)
    inputs = [query, key, value.detach().to(dtype).requires_grad_()]
    with torch.autocast("cpu", dtype):
        output = attend(inputs, lengths)
        exact = attend([query, key, inputs[2].float()], lengths)
        gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert (output.dtype, exact.dtype) == (dtype, torch.float32)
    assert torch.equal(output, exact.to(dtype))
    assert [each.dtype for each in gradients] == [torch.float32, torch.float32, dtype]
