"""The LM head with bias, scale and soft-cap: the fused loss, chunk by chunk, against autograd over all logits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dpo_lab.core import fused_lm_head
from dpo_lab.core.fused_lm_head import fused_loss, rows_per_chunk, token_logps
from dpo_lab.core.lm_head import LMHead
from dpo_lab.core.logps import sum_responses
from tests.support.pretend_cuda import DEVICE, pretend_cuda

CPU = torch.device("cpu")
LENGTHS = np.array([[3, 5, 2], [1, 9, 4], [2, 1, 1]])
ROWS = int(LENGTHS[:, 1:].sum())
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "soft-cap": {"softcap": 2.0},
    "all": {"bias": True, "scale": -1.7, "softcap": 1.5},
}


class NotPlain(nn.Linear):
    """A subclass, as adapters have it, may compute anything."""


def a_head(kind: type[nn.Linear], bias: bool = False, **how) -> LMHead:
    torch.manual_seed(0)
    return LMHead(kind(8, 13, bias=bias).double(), 13, **how)


def loss_of(logps: torch.Tensor, items: slice) -> torch.Tensor:
    return (logps[:, 0] - 2 * logps[:, 1]).tanh()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", [nn.Linear, NotPlain])
def test_any_head_has_the_gradient_of_all_its_logits(kind, name, rows, frozen, monkeypatch):
    monkeypatch.setattr(fused_lm_head, "ROWS", rows)
    head = a_head(kind, **HEADS[name])
    head.module.requires_grad_(not frozen)
    hidden = (3 * torch.randn(ROWS, 8, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(13, (ROWS,))
    inputs = [hidden, *(p for p in head.module.parameters() if not frozen)]

    logits = head.scale * nn.functional.linear(hidden, head.module.weight, head.module.bias)
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = loss_of(sum_responses(exact, LENGTHS), slice(None)).sum()
    found, sums = fused_loss(hidden, head, targets, LENGTHS, loss_of)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums, sum_responses(exact, LENGTHS).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(token_logps(hidden, head, targets), exact, rtol=0, atol=1e-12)
    for ours, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def test_a_gpu_sums_the_weights_gradient_in_float32(monkeypatch):
    """Over pieces of 2 rows; the CPU rounds each piece to 16 bits, a GPU's product does not."""
    head = a_head(nn.Linear)
    head.module.float()
    hidden = 3 * torch.randn(ROWS, 8)
    targets = torch.randint(13, (ROWS,))

    def gradients(device, **how) -> list[torch.Tensor]:
        module, rows = nn.Linear(8, 13, bias=False), hidden.clone().to(device).requires_grad_()
        module.weight = nn.Parameter(head.module.weight.detach().to(device))
        with torch.autocast(device.type, **how):
            found, _ = fused_loss(rows, LMHead(module, 13), targets.to(device), LENGTHS, loss_of)
        found.backward()
        assert rows.grad is not None
        assert module.weight.grad is not None
        return [rows.grad.cpu(), module.weight.grad.cpu()]

    monkeypatch.setattr(fused_lm_head, "ROWS", 2)
    monkeypatch.setattr(fused_lm_head, "GPU_ROWS", 2)
    exact = gradients(torch.device("cpu"), enabled=False)
    on_cpu = gradients(torch.device("cpu"), dtype=torch.bfloat16)
    with pretend_cuda():
        on_gpu = gradients(DEVICE, dtype=torch.bfloat16)
    error = [
        max((one - two).norm() / two.norm() for one, two in zip(each, exact, strict=True)) for each in (on_gpu, on_cpu)
    ]
    assert error[0] < error[1] < 0.05
    assert [each.dtype for each in on_gpu] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("vocabulary", "gigabytes", "rows"),
    [(151936, 80, 2048), (151936, 24, 883), (2000, 24, 2048), (262144, 8, 170), (2**31, 8, 1)],
)
def test_pieces_of_logits_grow_with_the_memory_of_a_gpu(vocabulary, gigabytes, rows, monkeypatch):
    """For Qwen2.5's words and Gemma's: at most 2,048 rows, and 1/32 of the card for logits in 16 and in 32 bits."""
    with pretend_cuda():
        assert rows_per_chunk(8192, CPU) == 512
        properties = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        assert rows_per_chunk(vocabulary, DEVICE) == rows
