"""Whole runs on a pretended GPU (see tests.support.pretend_cuda): nothing is computed on the CPU, and no devices clash."""

from __future__ import annotations

import json
import os
import random
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo_lab.models.policy import Policy, load_policy
from tests.support import warm

pytestmark = pytest.mark.slow

WORDS = "the plot was good and its music too slow ending felt odd villain".split()
QUIET = (
    "data=jsonl data.path=pairs.jsonl data.batch_size=8 data.tokens_per_microbatch=300 policy=pretrained policy.path=mine"
    " optim=default trainer.max_steps=3 trainer.val_check_interval=2 trainer.log_every_n_steps=1 evals.num_prompts=4"
    " evals.num_texts=4 evals.num_train_pairs=8 evals.max_new_tokens=6 figures=false logger=csv"
).split()


def pretended(*command: str) -> None:
    """A command in this process, which has a GPU; prints how many products of matrices it computed on the CPU, and calls of
    the kernel for shared prompts, forward and backward.

    A model is probed, and its path tried, where it is loaded, on the CPU, before the run has a device: that is left out.
    """
    from dpo_lab.models import forward, load
    from tests.support import varlen
    from tests.support.pretend_cuda import pretend_cuda

    select = forward.select_forward

    def select_uncounted(*args: Any) -> None:
        before = cuda.cpu_products
        select(*args)
        cuda.cpu_products = before

    at_load = patch.object(forward, "select_forward", select_uncounted)  # not that of the pipelines, on the device
    with patch.object(load, "check_behaviour"), pretend_cuda(int(os.environ.get("WORLD_SIZE", "1"))) as cuda, at_load:
        try:
            warm.main(*command)
        finally:
            print("on the CPU:", cuda.cpu_products)
            print("kernel calls:", varlen.CALLS["forward"], varlen.CALLS["backward"])


def make_shop(folder: Path, policy: Policy) -> Path:
    """Put a model of random weights in `folder`/mine, and pairs for it beside it."""
    policy.save(folder / "mine")
    draw = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(40):
            prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(3))
            file.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def shop(policy, tmp_path_factory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop"), policy)


def record_of(shop: Path, name: str) -> dict:
    return json.loads(next((shop / "outputs" / name).glob("*/*/run.json")).read_text())


def on_gpu(shop: Path, module: str, *arguments: str) -> tuple[int, int]:
    """How often it called the kernel for shared prompts, forward and backward."""
    with warm.Warm(pretended, module, *arguments, cwd=shop) as process:
        code, output, errors = process.wait(120)
    assert code == 0, errors
    assert "on the CPU: 0" in output
    forward, backward = output.split("kernel calls:")[1].split()
    return int(forward), int(backward)


@pytest.fixture(scope="module")
def calls(shop) -> tuple[int, int]:
    return on_gpu(shop, "dpo_lab.train", "trainer=gpu", "name=bf16", *QUIET)


@pytest.fixture(scope="module")
def trained(shop, calls) -> Path:
    return shop


def test_a_run_in_bf16_computes_everything_on_the_gpu(trained):
    """Reference, step 0, training, validation, samples, evaluators: under autocast a product on the CPU is an error."""
    record = record_of(trained, "bf16")
    assert record["status"] == "done"
    assert record["step_zero_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert record["peak_memory_bytes"] == 7 << 20  # the GPU's, not the process's
    assert load_policy(next((trained / "outputs/bf16").glob("*/*")) / "policy").model.device.type == "cpu"


def test_a_run_in_bf16_attends_to_shared_prompts_by_one_kernel(calls, policy):
    """Once a layer and micro-batch, of which each of 3 steps has at least one; without gradients for the reference."""
    forward, backward = calls
    layers = policy.model.config.num_hidden_layers
    assert forward % layers == backward % layers == 0
    assert forward > backward >= 3 * layers


def test_a_run_in_fp32_after_one_on_the_cpu_has_its_figures_and_a_reference_of_its_own(shop):
    one = warm.run_module("dpo_lab.train", "name=cpu", *QUIET, cwd=shop)
    assert one.returncode == 0, one.stderr
    before = set((shop / "outputs/cache").glob("reference-*.safetensors"))
    calls = on_gpu(shop, "dpo_lab.train", "trainer=gpu", "trainer.precision=32-true", "name=fp32", *QUIET)
    assert calls == (0, 0)  # the kernel has no float32
    assert len(set((shop / "outputs/cache").glob("reference-*.safetensors")) - before) == 1
    cpu, gpu = record_of(shop, "cpu"), record_of(shop, "fp32")
    assert cpu["identity"] == gpu["identity"]
    assert cpu["metrics"].keys() == gpu["metrics"].keys()
    for name, estimate in cpu["metrics"].items():
        assert gpu["metrics"][name]["value"] == pytest.approx(estimate["value"], rel=1e-3, abs=1e-4), name


def test_a_later_evaluation_computes_on_the_gpu(trained):
    folder = next((trained / "outputs/bf16").glob("*/*"))
    on_gpu(trained, "dpo_lab.evaluate", f"run='{folder.relative_to(trained)}'")
    again = json.loads((folder / "evaluations" / "1.json").read_text())["metrics"]
    assert again["kl"] == record_of(trained, "bf16")["metrics"]["kl"]


def test_supervised_fine_tuning_computes_on_the_gpu(shop):
    """Of adapters, which share their frozen base with the initial policy, over checkpointed layers."""
    adapters = ["policy=lora", "policy.lora.r=2", "policy.gradient_checkpointing=true"]
    on_gpu(shop, "dpo_lab.sft", "trainer=gpu", "name=sft", *QUIET, *adapters)
    assert record_of(shop, "sft")["status"] == "done"


def test_a_run_that_finds_what_fits_and_offloads_is_the_same_bits(shop):
    """As one with that number of tokens and without offloading: trials leave no trace."""
    saving = ["data.tokens_per_microbatch=auto", "policy.activation_offload=true", "policy.gradient_checkpointing=true"]
    on_gpu(shop, "dpo_lab.train", "trainer=gpu", "name=saving", *QUIET, *saving)
    saved = record_of(shop, "saving")
    tokens = f"data.tokens_per_microbatch={saved['tokens_per_microbatch']}"
    on_gpu(shop, "dpo_lab.train", "trainer=gpu", "name=plain", *QUIET, tokens)
    plain = record_of(shop, "plain")
    assert "tokens_per_microbatch" not in plain
    assert saved["tokens_per_microbatch"] > 100
    assert saved["trained_policy"] == plain["trained_policy"]


def test_ranks_talk_over_a_group_that_serves_gpus_alone(shop):
    """Two ranks of DDP from start to end; DDP's own sum of gradients, which is C++, is left out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    command = ["dpo_lab.train", "trainer=ddp", "trainer.devices=2", "name=ddp", *QUIET]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(warm.Warm(pretended, *command, cwd=shop, RANK=rank, LOCAL_RANK=rank, **shared))
            for rank in ("0", "1")
        ]
        for code, output, errors in [rank.wait(180) for rank in ranks]:
            assert code == 0, errors
            assert "on the CPU: 0" in output
    record = record_of(shop, "ddp")
    assert record["status"] == "done"
    assert len(record["ranks"]) == 2
    assert record["memory"]["peak_growth"] == 0
