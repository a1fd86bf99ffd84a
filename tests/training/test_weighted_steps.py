"""Weights of tokens and of pairs in a step: the same in one micro-batch, in many, and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dpo_lab.core.losses import DPO, RPO, Loss
from dpo_lab.core.losses.base import Weighting
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.policy import trainable_copy
from dpo_lab.models.reference import Cached
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from tests.conftest import make_pairs
from tests.core.test_token_weights import with_gaps
from tests.support.fits import BATCH, HELD_OUT, PAIRS, Seen, flat, initial_policy, make_trainer
from tests.support.ranks import become_rank, run_in_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning"),
]
KINDS: dict[str, Loss] = {
    "tokens": RPO(0.5, ld_alpha=0.3),
    "pairs": DPO(0.5, weighting=Weighting.wpo),
}
STEPS = 4


def pairs_of(loss: Loss) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Training and held-out pairs with tokens that are not scored."""
    parts = make_pairs(PAIRS, vocabulary=250), make_pairs(HELD_OUT, seed=9, vocabulary=250)
    train, held_out = (with_gaps(pairs, loss.ld_alpha) for pairs in parts)
    return train, held_out


def train(folder: Path, name: str, tokens: int, devices: int = 1):
    """(module, what was logged and the first gradient, the trainer)."""
    loss, model = KINDS[name], initial_policy().model
    pairs, held_out = pairs_of(loss)
    reference = Cached().prepare(model, [*pairs, *held_out], folder)
    step = dict(total_steps=STEPS, batch_size=BATCH, tokens_per_microbatch=tokens)
    module = DPOModule(trainable_copy(model), loss, reference, Optim(lr=1e-3, warmup_steps=0), **step)
    data = PreferenceDataModule(pairs, held_out, batch_size=BATCH, num_workers=0, seed=0)
    seen = Seen()
    trainer = make_trainer(STEPS, devices, callbacks=[seen], strategy="ddp" if devices > 1 else "auto")
    trainer.fit(module, datamodule=data)
    return module, seen, trainer


def rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    for name in KINDS:
        module, seen, trainer = train(Path(folder), name, 60, world_size)
        if number == 0:
            torch.save((seen.gradient, flat(module.model.parameters())), Path(folder) / f"{name}.pt")
            figures = {"name": name, "figures": seen.figures, "val": trainer.callback_metrics["val/loss"].item()}
            print("RESULT", json.dumps(figures))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each kind's steps in one micro-batch each."""
    return {name: train(tmp_path_factory.mktemp(name), name, 100_000) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_change_nothing(name, whole, tmp_path):
    module, seen, trainer = whole[name]
    split, seen_split, trainer_split = train(tmp_path, name, 30)
    torch.testing.assert_close(seen_split.gradient, seen.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat(split.parameters()), flat(module.parameters()), rtol=0, atol=2e-5)
    for one, other in zip(seen_split.figures, seen.figures, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    of_both = [each.callback_metrics["val/loss"].item() for each in (trainer_split, trainer)]
    assert of_both[0] == pytest.approx(of_both[1], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("name", KINDS)
def test_ranks_change_nothing(name, whole, by_ranks):
    folder, rows = by_ranks
    module, seen, trainer = whole[name]
    gradient, weights = torch.load(folder / f"{name}.pt", weights_only=True)
    torch.testing.assert_close(gradient, seen.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, flat(module.model.parameters()), rtol=0, atol=2e-5)
    for one, other in zip(rows[name]["figures"], seen.figures, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert rows[name]["val"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    output, _ = run_in_ranks("tests.training.test_weighted_steps", "rank", 2, str(folder))
    rows = [json.loads(line.split("RESULT", 1)[1]) for line in output.splitlines() if "RESULT" in line]
    return folder, {row["name"]: row for row in rows}


def test_weights_change_what_is_trained(whole):
    """Else the comparisons above would hold for weights that nothing reads."""
    gradients = [whole[name][1].gradient for name in KINDS]
    assert not torch.allclose(*gradients, rtol=1e-2)
    losses = [whole["pairs"][1].figures[0]["train/loss"], whole["tokens"][1].figures[0]["train/loss"]]
    assert losses[0] < 0.69 < losses[1]  # ln 2 times weights below 1; ln 2 and a likelihood
