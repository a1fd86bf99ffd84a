"""What a GPU would compute, under FakeTensorMode: run as a module after loading fake_cuda.cpp, it prints what each part did.

A step, a validation, samples and an evaluation of three models, in float32 and in bf16: real operators' shapes, dtypes and
devices, CUDA's own autocast, no numbers. An operator that gets tensors of two devices raises.
"""

from __future__ import annotations

import copy
import ctypes
import json
import sys

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch

from contextlib import nullcontext  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # optimizers import it, and it takes stock of torch
import torch.nn.attention.varlen  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from dpo_lab.core.losses import DPO  # noqa: E402
from dpo_lab.data.collate import collate, collate_responses  # noqa: E402
from dpo_lab.models.forward import pair_logps, response_logps, select_forward  # noqa: E402
from dpo_lab.models.paths import path_of  # noqa: E402
from dpo_lab.models.sampling import sample  # noqa: E402
from dpo_lab.training.dpo_module import DPOModule  # noqa: E402
from dpo_lab.training.optim import Optim  # noqa: E402
from tests.conftest import make_pairs  # noqa: E402
from tests.support.architectures import CACHED, VOCABULARY, made  # noqa: E402

MODELS = {"Llama": "Llama", "window": "Gemma 3", "soft-cap and window": "Gemma 2", "experts": "Qwen3 MoE"}
OF_CUDA: dict[str, Any] = dict(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    is_bf16_supported=lambda *_, **__: True,
    get_device_capability=lambda *_: (9, 0),
    get_device_properties=lambda *_: type("Properties", (), {"total_memory": 80 << 30, "major": 9, "minor": 0})(),
)


class NoDevice(FakeTensorMode):
    """FakeTensorMode that takes no number to a GPU, though torch.cuda says that there is one."""

    avoid_device_init = True  # type: ignore[assignment]


class Watched(TorchDispatchMode):
    """Counts operators, kernels of attention and products by device; answers the host's questions by 0, pins no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"operators": 0, "kernels": 0, "products on the CPU": 0, "questions": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            self.counts["questions"] += 1
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        is_aten = func.namespace == "aten"
        if is_aten and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode hands these on as they are
                return func.decompose(*args, **(kwargs or {}))
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)]
        self.counts["operators"] += 1
        self.counts["kernels"] += "varlen" in func.name()
        if "mm" in func.name():
            self.counts["products on the CPU"] += any(each.device.type == "cpu" for each in tensors)
        return result


def on_fake_cuda(model: Any) -> Any:
    """Replace parameters and buffers by fake ones on cuda; tied ones stay tied."""
    new: dict[Any, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and tensor not in new:
                    empty = torch.empty_like(tensor, device="cuda")
                    new[tensor] = torch.nn.Parameter(empty) if kind is module._parameters else empty
                if tensor is not None:
                    kind[name] = new[tensor]
    return model


def run(name: str, precision: str) -> dict[str, Any]:
    """One step, validation, sampling and evaluation of a model; what each of them did."""
    model = made(*CACHED[MODELS[name]])
    if name == "experts":
        model.set_experts_implementation("batched_mm")  # grouped products have fake ones for bf16 weights alone
    select_forward(model)
    twin = copy.deepcopy(model)
    context = (lambda: torch.autocast("cuda", torch.bfloat16)) if precision == "bf16" else nullcontext
    found: dict[str, Any] = {"shares prompts": path_of(model).shares_prompts}
    batch = collate(make_pairs(4, vocabulary=VOCABULARY))
    with NoDevice(allow_non_fake_inputs=True), patch.multiple(torch.cuda, **OF_CUDA):
        model, twin = on_fake_cuda(model), on_fake_cuda(twin)
        step = dict(total_steps=2, batch_size=4, tokens_per_microbatch=64)
        module = DPOModule(model, DPO(0.1), torch.no_grad()(partial(pair_logps, twin)), Optim(), **step)
        for metrics in (module.train_metrics, module.val_metrics, module.val_margins):
            metrics.to("cuda")
        optimizer, _ = module.optim.build(model.parameters(), 2)

        def train() -> None:
            for part in batch.to("cuda").split(64):
                with context():
                    loss = module.part_loss(part)
                assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
                loss.backward()
            module.optim.clip(model.parameters())
            assert all(p.grad is not None and p.grad.device.type == "cuda" for p in model.parameters())
            optimizer.step()

        def validate() -> None:
            with context(), torch.no_grad():
                module.validate_part(batch.to("cuda"))

        def draw() -> None:
            with context():
                samples = sample(model, [[3, 4, 5], [6]], max_new_tokens=4, end_ids=[2], pad_id=0, seed=0)
            assert [len(each.tokens) for each in samples] == [4, 4]

        def evaluate() -> None:
            tokens, lengths = collate_responses([[3, 4], [5]], [[6, 7, 8], [9]])
            with context(), torch.no_grad():
                logps = response_logps(model, tokens.to("cuda"), lengths)
            assert (logps.shape, logps.device.type, logps.dtype) == ((2, 1), "cuda", torch.float32)

        for part in (train, validate, draw, evaluate):
            with Watched() as watched:
                part()
            found[part.__name__] = watched.counts
    return found


if __name__ == "__main__":
    for each in MODELS:
        for how in ("float32", "bf16"):
            print(json.dumps({"model": each, "precision": how} | run(each, how)), flush=True)
