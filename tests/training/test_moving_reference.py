"""A moving reference (TR-DPO): it becomes the policy, or follows it, at its steps, and is resumed bit by bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.models.reference import Moving
from tests.support.configs import settled
from tests.support.fits import flat, initial_policy, make_data, make_module, make_trainer
from tests.support.small_fit import IGNORED, cut, difference, left, run

pytestmark = [pytest.mark.filterwarnings(each) for each in (*IGNORED, "ignore:.*gradient_checkpointing:FutureWarning")]


class Weights(Callback):
    """The weights of policy and reference after every step."""

    def __init__(self) -> None:
        self.policy: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.policy.append(flat(module.model.parameters()))
        self.reference.append(flat(module.reference.model.parameters()))


def followed(folder: Path, **settings) -> tuple[torch.Tensor, Weights]:
    seen, policy = Weights(), initial_policy()
    module = make_module(policy.model, folder, 6)
    module.reference = Moving(**settings).prepare(policy.model, (), folder)
    make_trainer(6, callbacks=[seen]).fit(module, datamodule=make_data())
    return flat(policy.model.parameters()), seen


def test_a_hard_update_makes_it_the_policy(tmp_path):
    initial, seen = followed(tmp_path, every=2)
    expected = [initial, *[seen.policy[1]] * 2, *[seen.policy[3]] * 2, seen.policy[5]]
    assert all(torch.equal(one, other) for one, other in zip(seen.reference, expected, strict=True))
    assert not torch.equal(seen.policy[1], seen.policy[3])


def test_a_soft_update_mixes_it_with_the_policy(tmp_path):
    expected, seen = followed(tmp_path, every=1, mixup=0.25)
    for policy, reference in zip(seen.policy, seen.reference, strict=True):
        expected = 0.75 * expected + 0.25 * policy
        torch.testing.assert_close(reference, expected)


def test_right_after_an_update_the_loss_is_ln_2(tmp_path):
    policy = initial_policy()
    module = make_module(policy.model, tmp_path, 3)
    module.reference = Moving(every=3).prepare(policy.model, (), tmp_path)
    make_trainer(3).fit(module, datamodule=make_data())
    batch = next(iter(make_data().train_dataloader()))
    with torch.no_grad():
        assert module.part_loss(batch).item() / len(batch) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_crash_at_any_step_changes_nothing(step, adapters, tmp_path):
    """A checkpoint is written every 2 steps, the reference moves every 3."""
    settings = dict(reference=Moving(every=3, mixup=0.5), adapters=adapters)
    run(tmp_path / "whole", **settings)
    cut(tmp_path / "cut", step, **settings)
    run(tmp_path / "cut", **settings)
    whole, resumed = left(tmp_path / "whole"), left(tmp_path / "cut")
    assert difference(whole, resumed) is None
    assert {f"model.{name}" for name in whole["reference"]} <= whole["state_dict"].keys()
    assert len(whole["reference"]) == (14 if adapters else 11)  # two matrices of each linear layer; tied weights once


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference.every=0", r"reference.every=0: must be .*reference.every=64"),
        ("reference.mixup=0", r"reference.mixup=0.0: must lie in \(0, 1\]"),
        (
            "policy=pretrained policy.path=m policy.dtype=bfloat16 reference.mixup=0.01",
            r"reference.mixup=0.01: weights kept in 16 bits .* type reference.mixup=1, or policy.dtype=float32",
        ),
        ("trainer=fsdp_cpu", "reference=moving: does not follow a policy sharded over the ranks; type trainer=ddp"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, message):
    with pytest.raises(Exception, match=message):
        settled("reference=moving", *override.split())


def test_a_soft_update_of_adapters_on_weights_of_16_bits_is_accepted():
    """Adapters are kept in float32."""
    settled("reference=moving", "reference.mixup=0.01", "policy=lora", "policy.path=m", "policy.dtype=bfloat16")
