"""Shared prompts through the variable-length kernel, which is emulated here: its layout, backward pass and selection."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu
from dpo_lab.models import attention
from dpo_lab.models.attention import Segments, shared_prompt_attention
from dpo_lab.models.forward import response_logps, select_forward
from dpo_lab.models.varlen import CAUSAL, Layout, supports, varlen_attention
from tests.support import varlen as kernel
from tests.support.pretend_cuda import DEVICE, pretend_cuda

HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}
CPU = torch.device("cpu")


def draw_lengths(draw: random.Random, responses: int) -> list[list[int]]:
    return [[draw.randint(1, 20) for _ in range(1 + responses)] for _ in range(draw.randint(1, 4))]


def draw_inputs(lengths, heads, dtype=torch.float64, head_size: int = 8) -> list[Tensor]:
    """Query, key and value [1, heads, tokens, head size] of a stream."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(1, count, sum(map(sum, lengths)), head_size) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_kernel(inputs: list[Tensor], lengths, scale=None, window=CAUSAL) -> Tensor:
    query, key, value = inputs
    return varlen_attention(query, key, value, Layout.of(lengths, query.device), scale, window)


def by_loop(inputs: list[Tensor], lengths, scale=None, window: int | None = None) -> Tensor:
    how = {"segments": Segments(lengths), "scaling": scale, "sliding_window": window}
    return shared_prompt_attention(torch.nn.Module(), *inputs, None, **how)[0]


def by_definition(inputs: list[Tensor], lengths, left: int) -> Tensor:
    """Softmax over the whole stream, where a token attends to its item's prompt and its own response, `left` back."""
    query, key, value = inputs
    item, part, position = [], [], []
    for i, (prompt, *responses) in enumerate(lengths):
        for j, size in enumerate((prompt, *responses)):
            item += [i] * size
            part += [j] * size
            position += range(prompt, prompt + size) if j else range(size)
    item, part, position = (torch.tensor(each) for each in (item, part, position))
    back = position[:, None] - position
    seen = (item[:, None] == item) & ((part == 0) | (part[:, None] == part)) & (back >= 0) & (back <= left)
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def assert_equal(ours: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    """To 1e-12, forward and in the gradients of a random sum."""
    weights = torch.randn(other.shape, generator=torch.Generator().manual_seed(2), dtype=other.dtype)
    gradients = (torch.autograd.grad(each, inputs, weights) for each in (ours, other))
    for one, two in zip((ours, *next(gradients)), (other, *next(gradients)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_layout_repeats_each_prompt_before_its_later_responses():
    layout = Layout.of([[2, 1, 3], [1, 2, 1]], CPU)
    assert layout.cu_q.tolist() == [0, 3, 6, 9, 10]
    assert layout.cu_k.tolist() == [0, 3, 8, 11, 13]
    assert (layout.max_q, layout.max_k) == (3, 5)
    assert layout.rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 6, 9]
    assert layout.places.tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 11, 9, 10, 12]
    assert layout.starts.tolist() == [0, 2, 4, 5, 6, 7, 8, 10, 11, 12]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("responses", [1, 2, 3, 4])
def test_the_kernel_gives_the_loops_numbers(responses, heads):
    """42 random layouts a case, 504 together."""
    draw = random.Random(f"{responses} {heads}")
    for _ in range(42):
        lengths = draw_lengths(draw, responses)
        inputs = draw_inputs(lengths, HEADS[heads])
        scale, window = draw.choice([None, 0.5]), draw.choice([None, None, 1, 2, 5, 13, 21, 40, 100])
        left = CAUSAL if window is None else (window - 1, 0)
        assert_equal(by_kernel(inputs, lengths, scale, left), by_loop(inputs, lengths, scale, window), inputs)


@pytest.mark.parametrize("left", [0, 1, 5, 12, 100])
@pytest.mark.parametrize("responses", [1, 2, 4])
def test_a_sliding_window_reaches_back_into_the_prompt(responses, left):
    draw = random.Random(left)
    for heads in HEADS.values():
        lengths = draw_lengths(draw, responses)
        inputs = draw_inputs(lengths, heads)
        defined = by_definition(inputs, lengths, left)
        assert_equal(by_kernel(inputs, lengths, window=(left, 0)), defined, inputs)
        assert_equal(by_loop(inputs, lengths, window=left + 1), by_definition(inputs, lengths, left), inputs)


class Operators(TorchDispatchMode):
    """Counts operators that a GPU computes: no views and no allocations. The kernel is one of them, whatever it does."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info is not None for returned in func._schema.returns) and "empty" not in func.name():
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operators(attend, pairs: int) -> Counter[str]:
    """Of attention's forward and backward passes over pairs under autocast; all layers share layouts and masks."""
    lengths = [[30, 20, 25]] * pairs
    query, key, value = draw_inputs(lengths, (4, 2), torch.float32)
    inputs = [query, key, value.detach().bfloat16().requires_grad_()]
    gradient = torch.ones(1, 75 * pairs, 4, 8, dtype=torch.bfloat16)
    mode = Operators()
    with mode, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = attend(inputs, lengths)
    with mode:
        output.backward(gradient)
    return mode.counts


def test_its_operators_are_as_many_for_any_number_of_pairs():
    one, many = (operators(by_kernel, pairs) for pairs in (1, 16))
    assert one == many
    assert one["torch_attn::_varlen_attn"] == one["torch_attn::_varlen_attn_backward"] == 1
    assert many.total() == gpu.KERNELS
    loop = [operators(by_loop, pairs).total() for pairs in (4, 5)]
    assert loop[1] - loop[0] == gpu.LOOPED


def test_gradients_are_summed_without_atomics():
    """By one gather and sum; index_add, scatter_add and index_put add in any order on a GPU."""
    stream = torch.randn(10, 2, 8, requires_grad=True)
    repeated = Layout.of([[2, 1, 3], [1, 2, 1]], CPU).repeat(stream)
    gradient = torch.ones_like(repeated)
    with Operators() as mode:
        repeated.backward(gradient)
    assert mode.counts == {"aten::_embedding_bag_forward_only": 1}


def test_single_responses_are_not_repeated():
    stream = torch.randn(9, 2, 8)
    assert Layout.of([[2, 3], [1, 3]], CPU).repeat(stream) is stream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocasts_mixed_inputs_become_one_dtype(dtype):
    """Rotated queries and keys are float32, values are not; gradients have their inputs' dtypes."""
    lengths = [[5, 3, 4], [2, 6, 1]]
    query, key, value = draw_inputs(lengths, (4, 2), torch.float32)
    mixed = [query, key, value.detach().to(dtype).requires_grad_()]
    with torch.autocast("cpu", dtype):
        output = by_kernel(mixed, lengths)
    exact = by_loop([query, key, value], lengths)
    assert output.dtype is dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(output.float().sum(), mixed)
    assert [each.dtype for each in gradients] == [torch.float32, torch.float32, dtype]


def test_the_real_operators_shapes():
    lengths, dtype = [[200, 150, 150]] * 4, torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(1, heads, 2000, 64, dtype=dtype, device="cuda") for heads in (14, 2, 2))
        layout = Layout.of(lengths, query.device)
        output = varlen_attention(query, key, value, layout, 0.125)
        assert (output.shape, output.dtype, output.device) == ((1, 2000, 14, 64), dtype, query.device)
        assert (layout.rows.shape, layout.rows.device) == ((2800,), query.device)
        inputs = [torch.empty(1, heads, 2000, 64, dtype=dtype, requires_grad=True) for heads in (14, 2, 2)]
        by_kernel(inputs, lengths).sum().backward()  # not on cuda, where a CPU build can't go backward
        assert [each.grad.shape for each in inputs] == [each.shape for each in inputs]


def a_tensor(dtype=torch.bfloat16, head_size: int = 64, device: str = "cuda") -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, 2, 3, head_size, dtype=dtype, device=device)


SUPPORTED = {
    "bf16": (a_tensor(), {}, True),
    "fp16": (a_tensor(torch.float16), {}, True),
    "Ada": (a_tensor(), {"capability": (8, 9)}, True),
    "Turing": (a_tensor(torch.float16), {"capability": (7, 5)}, False),
    "float32": (a_tensor(torch.float32), {}, False),
    "float32 under autocast": (a_tensor(torch.float32), {"autocast": True}, True),
    "CPU": (a_tensor(device="cpu"), {}, False),
    "dropout": (a_tensor(), {"dropout": 0.1}, False),
    "heads of 512": (a_tensor(head_size=512), {}, False),
    "heads of 20": (a_tensor(head_size=20), {}, False),
    "torch 2.12": (a_tensor(), {"version": "2.12.1"}, False),
    "AMD": (a_tensor(), {"hip": "6.4"}, False),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_selection(case, monkeypatch):
    tensor, differs, expected = SUPPORTED[case]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: differs.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "hip", differs.get("hip"))
    monkeypatch.setattr(torch, "__version__", TorchVersion(differs.get("version", torch.__version__)))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: differs.get("autocast", False))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    assert supports(tensor, tensor, differs.get("dropout", 0.0)) is expected


@pytest.fixture
def cuda():
    with pretend_cuda() as mode:
        yield mode


def test_on_a_gpu_without_the_kernel_the_loop_repeats_keys_instead_of_grouping_heads(cuda, monkeypatch):
    """SDPA's fast kernels take neither a mask nor float32 together with enable_gqa."""
    lengths = [[5, 3, 4], [2, 6, 1]]
    inputs = draw_inputs(lengths, (4, 2), torch.float32)
    on_gpu = [each.detach().to(DEVICE).requires_grad_() for each in inputs]
    grouped = []
    real = attention.scaled_dot_product_attention
    spied = lambda *args, **how: grouped.append(how["enable_gqa"]) or real(*args, **how)  # noqa: E731
    monkeypatch.setattr(attention, "scaled_dot_product_attention", spied)
    output, exact = by_loop(on_gpu, lengths), by_loop(inputs, lengths)
    assert grouped == [False] * 4 + [True] * 4
    torch.testing.assert_close(output.cpu(), exact, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(output.sum(), on_gpu), torch.autograd.grad(exact.sum(), inputs)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-5, atol=1e-6)


CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_under_autocast_builds_one_layout_a_micro_batch(checkpointing, cuda, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    select_forward(model)
    lengths = np.array([[5, 3, 4, 2], [2, 6, 1, 9]])
    tokens = torch.randint(3, 61, (int(lengths.sum()),))
    response_logps(model, tokens, lengths).sum().backward()
    exact = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    model.to(DEVICE)
    made, before = [], Counter(kernel.CALLS)
    real = Layout.of
    monkeypatch.setattr(Layout, "of", lambda *args: made.append(real(*args)) or made[-1])
    with torch.autocast("cuda", torch.bfloat16):
        logps = response_logps(model, tokens.to(DEVICE), lengths)
    logps.sum().backward()
    assert len(made) == 1
    assert kernel.CALLS - before == {"forward": 6 if checkpointing else 3, "backward": 3}
    for ours, gradient in zip((parameter.grad for parameter in model.parameters()), exact, strict=True):
        assert ((ours.cpu() - gradient).norm() / gradient.norm()).item() < 0.05
