"""Offloaded activations: the same gradients bit by bit, and only what grows with the tokens is moved."""

from __future__ import annotations

import pytest
import torch

from dpo_lab.config.schema import ConfigError
from dpo_lab.core.losses import DPO
from dpo_lab.data.collate import collate
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import disable_dropout, pair_loss, select_forward
from dpo_lab.models.policy import Policy
from dpo_lab.models.reference import Uniform
from dpo_lab.training import activation_offload
from dpo_lab.training.activation_offload import offload_activations
from tests.conftest import make_pairs
from tests.support.configs import settled

BATCH = collate(make_pairs(5))


@pytest.fixture
def moved(monkeypatch) -> list[tuple[torch.Tensor, bool]]:
    """Each tensor that autograd saved under the hooks, and whether it was copied."""
    packed = []

    class Recording(activation_offload._SaveOnCPU):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            pack = self.pack_hook

            def record(tensor):
                held = pack(tensor)
                packed.append((tensor, held[1] is not tensor))
                return held

            self.pack_hook = record

    monkeypatch.setattr(activation_offload, "_SaveOnCPU", Recording)
    return packed


def gradients(policy: Policy, offloads: bool, path: str, checkpoints: bool) -> list[torch.Tensor]:
    model = trainable_copy(policy.model)
    if path == "shared":
        select_forward(model)
    else:
        model.set_attn_implementation("sdpa")
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model)
    if offloads:
        offload_activations(model.base_model)
    reference = Uniform().prepare(model, [], None)(BATCH)  # type: ignore[arg-type]
    pair_loss(model, BATCH, DPO(0.1), reference)[0].backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_are_the_same_bits_and_weights_stay(path, checkpoints, policy, moved):
    expected = gradients(policy, False, path, checkpoints)
    assert moved == []
    found = gradients(policy, True, path, checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    copied = sum(tensor.nbytes for tensor, is_copied in moved if is_copied)
    activations = len(BATCH.tokens) * policy.model.config.hidden_size * 4
    assert copied >= policy.model.config.num_hidden_layers * activations
    shapes = [tuple(p.shape) for p in policy.model.parameters()]
    weights = {*shapes, *(shape[::-1] for shape in shapes)}
    assert not any(is_copied for tensor, is_copied in moved if tuple(tensor.shape) in weights)


def test_a_forward_pass_that_fails_leaves_no_hooks(policy, moved):
    model = trainable_copy(policy.model)
    offload_activations(model.base_model)
    with pytest.raises(TypeError):
        model.base_model(input_ids=BATCH.tokens[None], position_ids="none")
    weight = torch.ones(3, requires_grad=True)
    (weight * weight).sum().backward()
    assert not any(tensor.shape == (3,) for tensor, _ in moved)


def test_on_the_cpu_it_is_refused():
    with pytest.raises(ConfigError, match=r"^policy.activation_offload=true: .* or trainer=gpu$"):
        settled("policy.activation_offload=true")
    assert settled("policy.activation_offload=true", "trainer=gpu").policy.activation_offload
    with pytest.raises(ConfigError, match=r"^policy.activation_offload=true: FSDP.* or trainer=ddp$"):
        settled("policy.activation_offload=true", "trainer=fsdp")
