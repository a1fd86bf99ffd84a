"""Linear layers under autocast with fewer casts: the same numbers as autocast's, and how often each thing is cast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dpo_lab.core.products import add_product, product
from dpo_lab.models.autocast_linear import LinearCasts
from tests.support.pretend_cuda import DEVICE, pretend_cuda

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
TOKENS = torch.arange(3, 43).view(2, 20)


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "qwen":  # with biases
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if kind == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    if kind == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def loss_of(model, dtype=torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return logits.float().log_softmax(-1)[..., 7].sum()


def gradients(model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen", "lora", "checkpointed"])
def test_the_numbers_are_autocasts(kind, dtype):
    """Two micro-batches and an optimizer step between them; on the CPU equal to the bit, but for biases' gradients."""
    plain, ours = make_model(kind), make_model(kind)
    casts = LinearCasts([ours], keeps_copies=kind != "checkpointed").install()
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1) for model in (plain, ours)]
    for _ in range(2):
        for _ in range(2):
            one, two = loss_of(plain, dtype), loss_of(ours, dtype)
            assert torch.equal(one, two)
            one.backward()
            two.backward()
        expected = gradients(plain)
        assert gradients(ours).keys() == expected.keys()
        for name, gradient in gradients(ours).items():
            if name.endswith("bias"):
                torch.testing.assert_close(gradient, expected[name], rtol=0.01, atol=0.01 * gradient.abs().max().item())
                dict(ours.named_parameters())[name].grad.copy_(expected[name])  # so that the next step compares as well
            else:
                assert torch.equal(gradient, expected[name]), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        casts.refresh()


def test_without_a_refresh_the_step_would_be_lost():
    model = make_model("llama")
    casts = LinearCasts([model]).install()
    before = loss_of(model)
    with torch.no_grad():
        for layer in casts.layers:
            layer.weight.mul_(1.5)
    assert torch.equal(loss_of(model), before)
    casts.refresh()
    fresh = make_model("llama")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model), loss_of(fresh))
    assert not torch.equal(loss_of(model), before)


class Casts(TorchDispatchMode):
    """Counts casts between float32 and 16 bits, by whether they have the shape of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point() and (kwargs or {}).get("dtype"):
            is_weight = args[0].ndim < 3 and args[0].shape[0] != TOKENS.numel()
            self.weights, self.others = self.weights + is_weight, self.others + (not is_weight)
        return func(*args, **(kwargs or {}))


def casts_of(model, passes: int = 2) -> tuple[int, int]:
    with Casts() as mode:
        for _ in range(passes):
            loss_of(model)
    return mode.weights, mode.others


def test_weights_are_cast_once_and_inputs_once_for_all_layers_that_share_them():
    """A layer has 7 matrices and 3 biases, and inputs for q, k and v, for o, for gate and up, and for down."""
    plain, ours = make_model("qwen"), make_model("qwen")
    LinearCasts([ours]).install()
    weights, others = casts_of(plain)
    few_weights, fewer_others = casts_of(ours)
    assert weights - few_weights == 2 * 10  # 2 layers, each in one of two passes
    assert others - fewer_others == 2 * 2 * 3  # 2 passes, 2 layers: two of q, k, v and one of gate, up


def test_a_reference_of_the_same_base_shares_its_copies():
    model = make_model("llama")
    other = copy.deepcopy(model)
    for one, two in zip(model.modules(), other.modules(), strict=True):
        if type(one) is torch.nn.Linear:
            two.weight = one.weight
    casts = LinearCasts([model, other]).install()
    loss_of(model)
    found = dict(casts.copies)
    loss_of(other)
    assert casts.copies == found
    assert len(found) == 2 * 7


def test_a_validation_may_come_first():
    model = make_model("llama")
    LinearCasts([model]).install()
    with torch.inference_mode():
        loss_of(model)
    loss_of(model).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_removed_and_outside_of_autocast_it_is_the_plain_model():
    model, plain = make_model("llama"), make_model("llama")
    casts = LinearCasts([model]).install()
    exact = plain(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, exact)
    casts.remove()
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert casts.copies == {}
    assert torch.equal(loss_of(model), loss_of(plain))


def test_an_input_that_changed_in_place_is_cast_again():
    model = make_model("llama")
    casts = LinearCasts([model]).install()
    layer, x = casts.layers[0], torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        x.mul_(2)
        assert torch.equal(layer(x), 2 * first)


def test_a_gpus_products_leave_their_sums_in_float32():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=draw).bfloat16() for shape in ((5, 300), (300, 7)))
    exact = left.float() @ right.float()
    rounded = product(left, right, torch.float32)
    assert torch.equal(rounded, exact.bfloat16().float())  # on the CPU
    total = torch.full((5, 7), torch.nan)
    add_product(total, left, right, beta=0)
    add_product(total, left, right)
    assert torch.equal(total, rounded * 2)
    with pretend_cuda():
        left, right, total = (each.to(DEVICE) for each in (left, right, torch.full((5, 7), torch.nan)))
        assert torch.equal(product(left, right, torch.float32).cpu(), exact)
        add_product(total, left, right, beta=0)
        add_product(total, left, right)
        torch.testing.assert_close(total.cpu(), exact * 2)


def test_the_real_products_shapes_on_a_gpu():
    with FakeTensorMode():
        left, right = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((5, 3), (3, 7)))
        found = product(left, right, torch.float32)
        assert (found.shape, found.dtype, found.device.type) == ((5, 7), torch.float32, "cuda")
        added = torch.addmm(
            found, left, right, out_dtype=found.dtype
        )  # without `out`, which torch's CPU build can't fake
        assert (added.shape, added.dtype) == ((5, 7), torch.float32)
