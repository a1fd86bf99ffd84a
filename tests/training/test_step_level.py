"""Losses over whole steps train alike in one micro-batch, in many, and on two ranks; their running mean is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps
from dpo_lab.training.step_level_module import StepLevelModule
from tests.support.fits import BATCH, assert_same_fit, fit, flat, initial_policy, make_data, make_module, make_trainer
from tests.support.losses import STEP_LEVEL, make_loss
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
]
STEPS, STOP = 5, 3


def train(folder: Path, name: str, tokens: int, devices: int = 1, steps: int = STEPS, resume: Path | None = None):
    """See tests.support.fits.fit. tokens: of a micro-batch."""
    loss = make_loss(name, beta=0.5)
    module = make_module(initial_policy().model, folder, STEPS, tokens, loss)
    return fit(module, make_data(loss=loss), steps, devices, resume)


def rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    for name in STEP_LEVEL:
        _, found, _ = train(Path(folder), name, 60, world_size)
        if number == 0:
            torch.save(found, Path(folder) / f"{name}.pt")


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_in_ranks("tests.training.test_step_level", "rank", 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each loss's steps in one micro-batch each."""
    return {name: train(tmp_path_factory.mktemp(name), name, 100_000)[1] for name in STEP_LEVEL}


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_micro_batches_change_nothing(name, whole, tmp_path):
    assert_same_fit(train(tmp_path, name, 60)[1], whole[name])


@pytest.mark.ranks
@pytest.mark.parametrize("name", STEP_LEVEL)
def test_ranks_change_nothing(name, by_ranks, whole):
    assert_same_fit(torch.load(by_ranks / f"{name}.pt", weights_only=True), whole[name])


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_the_gradient_is_that_of_the_loss_of_the_whole_step(name, tmp_path):
    """Against autograd through one forward pass of all pairs."""
    module, found, _ = train(tmp_path, name, 60, steps=1)
    model, loss = initial_policy().model, make_loss(name, beta=0.5)
    batch = next(iter(make_data(loss=loss).train_dataloader()))
    policy, reference = pair_logps(model, batch), module.reference(batch)
    if batch.unrelated is not None:
        rows = pair_logps(model, batch.unrelated), module.reference(batch.unrelated)
        policy, reference = (
            replace(of, unrelated=row.chosen + row.rejected) for of, row in zip((policy, reference), rows, strict=True)
        )
    assert len(batch) == BATCH
    loss(policy, reference).mean().backward()
    exact = flat([p.grad for p in model.parameters() if p.grad is not None])
    limited = exact * min(1.0, 1.0 / exact.norm().item())  # clipped, as the step's
    torch.testing.assert_close(found["gradient"], limited, rtol=1e-4, atol=1e-6)


def test_the_running_mean_goes_on_from_a_checkpoint(tmp_path):
    whole, _, _ = train(tmp_path, "bco", 60)
    _, _, trainer = train(tmp_path, "bco", 60, steps=STOP)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module, _, _ = train(tmp_path, "bco", 60, resume=tmp_path / "half.ckpt")
    assert isinstance(module, StepLevelModule)
    assert isinstance(whole, StepLevelModule)
    assert module.running == whole.running is not None
    assert torch.equal(flat(module.parameters()), flat(whole.parameters()))


def test_a_pair_that_is_not_finite_is_named(tmp_path):
    module = make_module(initial_policy().model, tmp_path, STEPS, 60, make_loss("aot", beta=0.5))
    reference = module.reference

    def broken(batch):
        logps = reference(batch)
        bad = torch.tensor([key == "pair-3" for key in batch.keys])
        return replace(logps, chosen=logps.chosen.masked_fill(bad, torch.nan))

    module.reference = broken
    with pytest.raises(Exception, match="pair-3"):
        make_trainer(STEPS).fit(module, datamodule=make_data())
    assert collate([]).keys == []
