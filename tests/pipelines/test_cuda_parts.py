"""What a GPU run depends on, part by part, without a GPU: device set-up, collectives, cache keys, the policy after a fit."""

from __future__ import annotations

import copy
import signal
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import strategy as lightning_strategy
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dpo_lab.config import schema
from dpo_lab.distributed.collectives import all_gather_object, all_reduce_max, broadcast_object, map_across_ranks
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.evals.candidates import candidates
from dpo_lab.models.numerics import numerics_of
from dpo_lab.models.policy import Policy
from dpo_lab.models.reference_cache import cached_logps
from dpo_lab.models.sharding import Sharded
from dpo_lab.pipelines.setup import forward_settings, make_trainer
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.memory import MemoryTracker, peak_memory, restart_peak
from tests.conftest import make_pairs
from tests.evals.test_evals import subject_of
from tests.support import small_fit
from tests.support.configs import composed
from tests.support.pretend_cuda import DEVICE, DevicesDiffer, pretend_cuda

pytestmark = [pytest.mark.filterwarnings(rule) for rule in small_fit.IGNORED]


@pytest.fixture
def cuda():
    with pretend_cuda(devices=2) as mode:
        yield mode


@pytest.fixture
def of_gpus(cuda):
    """A group of two ranks that, like NCCL's, has no backend for the CPU; each says what this one says."""
    distributed.init_process_group("cuda:fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def bf16():
    return torch.autocast("cuda", torch.bfloat16)


def test_the_pretended_gpu_refuses_what_a_real_one_refuses(cuda):
    with pytest.raises(RuntimeError, match="not initialised"):
        torch.cuda.memory_allocated()
    on_gpu, on_cpu = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
    assert (on_gpu + torch.tensor(1.0)).device == DEVICE  # a scalar of the CPU is welcome
    assert on_gpu.sum(1).cpu().tolist() == [3, 3]
    for clash in (lambda: on_gpu + on_cpu, lambda: torch.cat([on_gpu, on_cpu]), lambda: on_gpu @ on_cpu.T):
        with pytest.raises(DevicesDiffer):
            clash()
    with pytest.raises(TypeError, match="numpy"):
        on_gpu.numpy()
    with bf16(), pytest.raises(DevicesDiffer, match="autocast"):
        on_cpu @ on_cpu.T
    with bf16():
        assert (on_gpu @ on_gpu.T).dtype is torch.bfloat16
    assert cuda.cpu_products == 1


@pytest.mark.parametrize("trainer", ["gpu", "ddp", "fsdp"])
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_gpu_is_set_up_before_anything_asks_for_it(trainer, command, cuda, tmp_path):
    cfg = composed(f"trainer={trainer}", "trainer.devices=1", name=command)
    settings = schema.validate(cfg)
    made = make_trainer(settings, {"trainer": settings.trainer, "callbacks": {}}, tmp_path)
    device = forward_settings(made).device
    assert device.type == "cuda"
    assert restart_peak(device) == 7 << 20  # refused before a GPU is initialised
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_messages_travel_over_a_group_that_serves_gpus_alone(of_gpus, policy):
    assert all_reduce_max(3) == 3
    assert all_gather_object({"a": 1}) == [{"a": 1}] * 2
    torch.cuda.set_device(DEVICE)
    assert peak_memory(DEVICE) == 7 << 20
    memory = MemoryTracker(DEVICE)
    memory.count_weights(policy.model, None)
    assert memory.as_record()["peak_growth"] == 0
    assert map_across_ranks(["a"], [1], str.upper) == ["A"]
    assert broadcast_object({"a": 1}) == {"a": 1}


def test_ranks_count_passes_and_share_caches_over_such_a_group(of_gpus, policy, tmp_path):
    sharding: Any = SimpleNamespace(device=DEVICE)
    sharded = Sharded(sharding, policy.model)
    assert sharded._any_rank_runs(True) is True
    assert sharded._any_rank_runs(False) is False
    module: Any = SimpleNamespace(_is_sharded=True, device=DEVICE)
    assert len(BaseModule.dummy_passes(module, 2)) == 0
    on_gpu = copy.deepcopy(policy.model).to(DEVICE)
    first, again = (cached_logps(on_gpu, make_pairs(3), tmp_path, bf16, 10**6) for _ in range(2))
    assert torch.equal(first.rows, again.rows)


def test_such_a_group_refuses_tensors_of_the_cpu(of_gpus):
    with pytest.raises(DevicesDiffer, match="No backend type associated with device type cpu"):
        distributed.all_reduce(torch.tensor(3))


def numerics(model, *contexts) -> list[str]:
    return [numerics_of(model, context) for context in contexts]


def test_numerics_tell_devices_precisions_and_kernels_apart(policy, cuda, monkeypatch):
    of_cpu = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    found = numerics(policy.model, nullcontext, of_cpu)
    other = copy.deepcopy(policy.model)
    other.set_attn_implementation("eager")
    found += numerics(other, nullcontext)
    other.to(torch.bfloat16)
    found += numerics(other, nullcontext)
    other = copy.deepcopy(policy.model).to(DEVICE)
    found += numerics(other, nullcontext, bf16)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    found += numerics(other, nullcontext)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TensorFloat-32
    found += numerics(other, nullcontext)
    assert len(set(found)) == len(found) == 8


def test_numerics_are_those_of_the_models_device(policy, cuda):
    """Autocast of a GPU leaves a model on the CPU in float32."""
    assert "bfloat16" in numerics_of(copy.deepcopy(policy.model).to(DEVICE), bf16)
    with pytest.raises(DevicesDiffer, match="autocast"):
        numerics_of(policy.model, bf16)


def test_a_gpu_has_a_reference_and_candidates_of_its_own(policy, cuda, tmp_path):
    on_gpu = Policy(copy.deepcopy(policy.model).to(DEVICE), policy.tokenizer)
    encoder = subject_of(policy, policy, ["the plot"]).encoder
    how = dict(max_new_tokens=3, batch_size=4, seed=0, folder=tmp_path)
    for each, context in ((policy, nullcontext), (on_gpu, nullcontext), (on_gpu, bf16)):
        cached_logps(each.model, make_pairs(3), tmp_path, context, 64)
        candidates(each, encoder, [encoder.prompt("the plot")], 2, context=context, **how)
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 3
    assert len(list(tmp_path.glob("candidates-*.json"))) == 3


class StopAfter(Callback):
    """Ask the run to stop, as a signal would, before its step N ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            assert pl_module.request is not None
            pl_module.request.signum = signal.SIGINT


@pytest.mark.parametrize("stop", [None, 3])
def test_the_optimizers_state_is_saved_and_freed_before_lightning_would_move_it(stop, tmp_path, monkeypatch):
    moved: list[int] = []
    move = lightning_strategy._optimizers_to_device

    def counted(optimizers, device) -> None:
        moved.append(sum(len(optimizer.state) for optimizer in optimizers))
        move(optimizers, device)

    monkeypatch.setattr(lightning_strategy, "_optimizers_to_device", counted)
    if stop is None:
        small_fit.run(tmp_path)
    else:
        with pytest.raises(StopSignal):
            small_fit.run(tmp_path, callbacks=[StopAfter(stop)])
    assert moved[-1] == 0  # the first is when the fit begins
    states = small_fit.left(tmp_path)["optimizer_states"][0]["state"]
    assert len(states) > 0
    assert all({"exp_avg", "exp_avg_sq"} <= set(state) for state in states.values())
