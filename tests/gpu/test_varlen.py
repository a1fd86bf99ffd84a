"""On a real GPU: the variable-length kernel against the loop in float64, its determinism, and no waiting for the device."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dpo_lab.models.varlen import CAUSAL, Layout, supports, varlen_attention
from tests.models.test_varlen import HEADS, by_definition, by_kernel, by_loop, draw_inputs, draw_lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="no GPU since Ampere is visible to torch",
    ),
]
DEVICE = "cuda"


def with_gradients(attend, inputs: list[Tensor], *args) -> list[Tensor]:
    """The output of an attention and the gradients of a random sum of it, on the CPU in float64."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = attend(leaves, *args)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return [each.detach().cpu().double() for each in (output, *torch.autograd.grad(output, leaves, weights))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((one - two).norm() / two.norm()).item() for one, two in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [8, 64, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("responses", [1, 2, 3, 4])
def test_the_kernel_is_as_exact_as_its_emulation_and_the_loop(responses, heads, head_size, dtype):
    draw = random.Random(f"{responses} {heads}")
    lengths = [[size * draw.choice([1, 7]) for size in item] for item in draw_lengths(draw, responses)]
    inputs = draw_inputs(lengths, HEADS[heads], dtype, head_size)
    exact = with_gradients(by_loop, [each.double() for each in inputs], lengths)
    on_gpu = [each.detach().to(DEVICE) for each in inputs]
    assert supports(on_gpu[0], on_gpu[2], 0.0)
    ours = errors(with_gradients(by_kernel, on_gpu, lengths), exact)
    emulated = errors(with_gradients(by_kernel, inputs, lengths), exact)
    loop = errors(with_gradients(by_loop, inputs, lengths), exact)
    for one, two, three in zip(ours, emulated, loop, strict=True):
        assert one <= 2 * max(two, three) + 1e-4


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_sliding_window_reaches_back_into_the_prompt(left):
    lengths = draw_lengths(random.Random(left), 3)
    inputs = draw_inputs(lengths, (4, 2), torch.bfloat16, 64)
    exact = with_gradients(by_definition, [each.double() for each in inputs], lengths, left)
    on_gpu = [each.detach().to(DEVICE) for each in inputs]
    found = with_gradients(by_kernel, on_gpu, lengths, None, (left, 0))
    assert max(errors(found, exact)) < 0.01


def test_gradients_repeat_bit_by_bit_where_that_is_asked():
    lengths = [[300, 200, 150, 90]] * 4
    inputs = [each.detach().to(DEVICE) for each in draw_inputs(lengths, (8, 2), torch.bfloat16, 64)]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (with_gradients(by_kernel, inputs, lengths) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


def test_nothing_waits_for_the_device():
    lengths = [[300, 200, 150]] * 4
    inputs = [each.detach().to(DEVICE).requires_grad_() for each in draw_inputs(lengths, (8, 2), torch.bfloat16, 64)]
    by_kernel(inputs, lengths).sum().backward()  # the first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = Layout.of(lengths, inputs[0].device)
        varlen_attention(*inputs, layout, None, CAUSAL).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float32_takes_the_loop():
    lengths = draw_lengths(random.Random(0), 2)
    inputs = draw_inputs(lengths, (4, 2), torch.float32, 64)
    on_gpu = [each.detach().to(DEVICE) for each in inputs]
    assert not supports(on_gpu[0], on_gpu[2], 0.0)
    exact = with_gradients(by_loop, [each.double() for each in inputs], lengths)
    assert max(errors(with_gradients(by_loop, on_gpu, lengths), exact)) < 1e-5
