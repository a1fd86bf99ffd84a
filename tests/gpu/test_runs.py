"""On a real GPU: runs from start to end, the device they evaluate on, their caches, and one rank over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pipelines.test_cuda_runs import QUIET, make_shop, record_of
from tests.support import warm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]
GPU = [*QUIET, "trainer.max_steps=8"]


@pytest.fixture(scope="module")
def shop(policy, tmp_path_factory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop"), policy)


def looked_at(*command: str) -> None:
    """A command in this process; says on which device it evaluates, and in which dtype products are computed there."""
    import dpo_lab.pipelines.train_dpo as of_run

    make = of_run.build_eval_context

    def subject_of(*args, **kwargs):
        subject = make(*args, **kwargs)
        devices = {p.device.type for policy in (subject.trained, subject.initial) for p in policy.model.parameters()}
        with subject.context():
            products = torch.ones(1, 1, device="cuda") @ torch.ones(1, 1, device="cuda")
        print("evaluates on", *devices, "in", products.dtype)
        return subject

    of_run.build_eval_context = subject_of
    warm.main(*command)


def done(shop: Path, name: str, *overrides: str) -> str:
    command = ["dpo_lab.train", f"name={name}", *GPU, *overrides]
    with warm.Warm(looked_at, *command, cwd=shop) as process:
        code, output, errors = process.wait(240)
    assert code == 0, errors
    assert record_of(shop, name)["status"] == "done"
    return output


def test_a_run_trains_and_evaluates_on_the_gpu_under_its_precision(shop):
    assert "evaluates on cuda in torch.bfloat16" in done(shop, "bf16", "trainer=gpu")
    memory = record_of(shop, "bf16")
    assert memory["memory"]["peak_growth"] > 0
    assert memory["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


def test_a_run_on_the_cpu_leaves_no_reference_to_one_on_the_gpu(shop):
    assert warm.run_module("dpo_lab.train", "name=cpu", *GPU, cwd=shop).returncode == 0
    before = set((shop / "outputs/cache").glob("reference-*.safetensors"))
    done(shop, "after-cpu", "trainer=gpu", "trainer.precision=32-true", "beta=1")
    assert len(set((shop / "outputs/cache").glob("reference-*.safetensors")) - before) == 1


def test_one_rank_trains_over_nccl(shop):
    assert "evaluates on cuda" in done(shop, "ddp", "trainer=ddp", "trainer.devices=1")
