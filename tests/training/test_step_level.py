"""Losses over whole steps train alike in one micro-batch, in many, and on two ranks; their running mean is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps
from dpo_lab.training.step_level_module import StepLevelModule
from tests.support.fits import BATCH, Seen, flat, initial_policy, make_data, make_module, make_trainer
from tests.support.losses import STEP_LEVEL, make_loss
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
]
STEPS, STOP = 5, 3


def train(folder: Path, name: str, tokens: int, devices: int = 1, steps: int = STEPS, resume: Path | None = None):
    """(module, what was logged and the first gradient, the trainer)."""
    seen = Seen()
    loss = make_loss(name, beta=0.5)
    module = make_module(initial_policy().model, folder, STEPS, tokens, loss)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(steps, devices, callbacks=[seen], strategy=strategy)
    trainer.fit(module, datamodule=make_data(loss=loss), ckpt_path=resume)
    return module, seen, trainer


def rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    for name in STEP_LEVEL:
        module, seen, trainer = train(Path(folder), name, 60, world_size)
        if number == 0:
            held_out = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            torch.save((seen.gradient, flat(module.model.parameters())), Path(folder) / f"{name}.pt")
            print("RESULT", json.dumps({"name": name, "figures": seen.figures, "held out": held_out}))


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    output, _ = run_in_ranks("tests.training.test_step_level", "rank", 2, str(folder))
    rows = [json.loads(line.split("RESULT", 1)[1]) for line in output.splitlines() if "RESULT" in line]
    return folder, {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_micro_batches_change_nothing(name, tmp_path):
    whole, seen, trainer = train(tmp_path, name, 100_000)
    split, seen_split, trainer_split = train(tmp_path, name, 60)
    torch.testing.assert_close(seen_split.gradient, seen.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat(split.parameters()), flat(whole.parameters()), rtol=0, atol=2e-5)
    for one, other in zip(seen_split.figures, seen.figures, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert trainer_split.callback_metrics["val/loss"].item() == pytest.approx(
        trainer.callback_metrics["val/loss"].item(), rel=1e-5
    )


@pytest.mark.ranks
@pytest.mark.parametrize("name", STEP_LEVEL)
def test_ranks_change_nothing(name, by_ranks, tmp_path):
    folder, rows = by_ranks
    module, seen, trainer = train(tmp_path, name, 100_000)
    gradient, weights = torch.load(folder / f"{name}.pt", weights_only=True)
    torch.testing.assert_close(gradient, seen.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, flat(module.model.parameters()), rtol=0, atol=2e-5)
    for one, other in zip(rows[name]["figures"], seen.figures, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert rows[name]["held out"]["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_the_gradient_is_that_of_the_loss_of_the_whole_step(name, tmp_path):
    """Against autograd through one forward pass of all pairs."""
    module, seen, _ = train(tmp_path, name, 60, steps=1)
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
    torch.testing.assert_close(seen.gradient, limited, rtol=1e-4, atol=1e-6)


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
