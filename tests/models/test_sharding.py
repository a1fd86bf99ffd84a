"""A model of any architecture, sharded as rank 0 loaded it: the same log-probabilities, copied, gathered, and in bf16."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from dpo_lab.models import sharded_weights
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import response_logps, select_forward
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.models.sharded_weights import from_rank_zero, gather_model, gathered_as_stored, kept_on_disk
from dpo_lab.models.sharding import Facts, Sharding, is_sharded
from tests.support.architectures import CACHED, UNCACHED, made

KINDS = ("Llama", "GPT-2", "Gemma 2", "Qwen3 MoE", "DeepSeek-V3", "BLOOM", "GPT-NeoX", "Mamba")
TOKENS, LENGTHS = torch.arange(3, 20), np.array([[4, 3, 2], [3, 2, 3]])


@pytest.fixture(scope="module")
def sharding():
    """Over one rank, to which a message is pickled as between ranks."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_weights, "broadcast_object", lambda value: pickle.loads(pickle.dumps(value)))
        yield Sharding(init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), torch.device("cpu"))
    distributed.destroy_process_group()


@torch.no_grad()
def logps(model) -> torch.Tensor:
    return response_logps(model, TOKENS, LENGTHS)


def started(sharding: Sharding, whole):
    return from_rank_zero(sharding, copy.deepcopy(whole), Facts(weights_digest(whole), False))


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_sharded_as_it_is(kind, sharding):
    whole = made(*(CACHED | UNCACHED)[kind])
    select_forward(whole)
    expected = logps(whole)
    model = started(sharding, whole)
    copied = trainable_copy(model)
    assert is_sharded(model)
    assert is_sharded(copied)
    with kept_on_disk(model):
        assert not any(weight._local_tensor.untyped_storage().nbytes() for weight in model.parameters())
        assert torch.equal(logps(copied), expected)
    assert torch.equal(logps(model), expected)
    assert weights_digest(model) == weights_digest(gather_model(copied)) == weights_digest(whole)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logps(whole)
        in_bf16 = started(replace(sharding, dtype=torch.bfloat16), whole)
        assert (logps(in_bf16) - rounded).abs().max() < 4 * (rounded - expected).abs().max()
    assert torch.equal(logps(gathered_as_stored(in_bf16)), expected)


def test_adapters_share_the_shards_of_their_base(sharding, policy):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        whole = peft.get_peft_model(copy.deepcopy(policy.model), config)
    select_forward(whole)
    model = started(sharding, whole)
    copied = trainable_copy(model)
    assert torch.equal(logps(copied), logps(whole))
    for (name, weight), other in zip(model.named_parameters(), copied.parameters(), strict=True):
        shared = weight._local_tensor.data_ptr() == other._local_tensor.data_ptr()
        assert shared is ("lora_" not in name)
        assert weight.requires_grad is other.requires_grad is ("lora_" in name)


def test_a_sharded_policy_is_saved_as_a_whole_one(sharding, policy, tmp_path):
    model = started(sharding, policy.model)
    whole = gather_model(model)
    assert whole is not None
    Policy(whole, policy.tokenizer).save(tmp_path / "sharded")
    policy.save(tmp_path / "whole")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sharded", "whole"))
    assert one == other
