"""A step waits for its GPU once, when it asks whether a number is not finite; seen on a pretended GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.core.pairs import to_device
from dpo_lab.models.reference import Cached, Frozen, Uniform
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.sft_module import SFTModule
from tests.support import small_fit
from tests.support.pretend_cuda import DEVICE, WAITS, pretend_cuda

pytestmark = [pytest.mark.extended, *(pytest.mark.filterwarnings(rule) for rule in small_fit.IGNORED)]


class Waits(Callback):
    """What made the host wait: in each step, from the end of the one before, and in each batch of a validation."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.validation: list[list[str]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(WAITS[:])
        WAITS.clear()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validation.append(WAITS[:])
        WAITS.clear()

    def on_validation_start(self, *_: Any) -> None:
        WAITS.clear()

    on_validation_end = on_validation_start


def waits(folder, **settings) -> Waits:
    """Of steps of several micro-batches, none of which logs."""
    found = Waits()
    quiet = dict(accelerator="gpu", log_every_n_steps=100, every_n_steps=0, logger=[])
    with pretend_cuda():
        small_fit.run(folder, callbacks=[found], steps=5, **(quiet | settings))
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("reference", [Uniform(), Cached(), Frozen()])
def test_a_step_waits_once(reference, precision, tmp_path):
    found = waits(tmp_path, kind=DPOModule, reference=reference, precision=precision)
    assert len(found.steps) == 5
    for step in found.steps[1:]:
        assert [what.rsplit(" ")[-1] for what in step] == ["_any_rank"], step
    assert not any(found.validation), found.validation


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("adapters", [None, torch.float32])
def test_so_does_a_step_of_fine_tuning_and_one_of_adapters(adapters, tmp_path):
    kind = SFTModule if adapters is None else DPOModule
    found = waits(tmp_path, kind=kind, adapters=adapters, precision="bf16-mixed")
    assert [[what.rsplit(" ")[-1] for what in step] for step in found.steps[1:]] == [["_any_rank"]] * 4
    assert not any(found.validation)


def test_what_makes_the_host_wait_is_seen():
    with pretend_cuda():
        numbers, mask = torch.ones(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
        WAITS.clear()
        for read in (
            lambda: numbers.sum().item(),
            lambda: numbers.tolist(),
            lambda: bool(mask[0]),
            lambda: numbers[mask],
            lambda: mask.nonzero(),
            lambda: numbers.masked_select(mask),
            lambda: numbers[torch.tensor([0])],
            lambda: numbers.cpu(),
            lambda: torch.ones(3).to(DEVICE),
            lambda: torch.ones(3).to(DEVICE, non_blocking=True),
            lambda: torch.tensor(1.0, device=DEVICE),
            lambda: numbers.repeat_interleave(mask.long()),
        ):
            read()
            assert len(WAITS) == 1, (read, WAITS)
            WAITS.clear()
        to_device(torch.ones(3), DEVICE)
        torch.full((), 3, device=DEVICE)
        torch.where(mask, numbers, 0).clamp(max=1).sum().isfinite()
        numbers[mask.long()]
        numbers.repeat_interleave(mask.long(), output_size=3)
        assert WAITS == []
