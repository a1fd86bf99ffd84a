"""Weights of tokens and of pairs in a step: the same in one micro-batch, in many, and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_lab.core.losses import DPO, RPO, Loss
from dpo_lab.core.losses.base import Weighting
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.reference import Cached
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from tests.conftest import make_pairs
from tests.core.test_token_weights import with_gaps
from tests.support.fits import BATCH, HELD_OUT, PAIRS, assert_same_fit, fit, initial_policy
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
    """See tests.support.fits.fit. tokens: of a micro-batch."""
    loss, model = KINDS[name], initial_policy().model
    pairs, held_out = pairs_of(loss)
    reference = Cached().prepare(model, [*pairs, *held_out], folder)
    step = dict(total_steps=STEPS, batch_size=BATCH, tokens_per_microbatch=tokens)
    module = DPOModule(trainable_copy(model), loss, reference, Optim(lr=1e-3, warmup_steps=0), **step)
    return fit(module, PreferenceDataModule(pairs, held_out, batch_size=BATCH, num_workers=0, seed=0), STEPS, devices)


def rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    for name in KINDS:
        _, found, _ = train(Path(folder), name, 60, world_size)
        if number == 0:
            torch.save(found, Path(folder) / f"{name}.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each kind's steps in one micro-batch each."""
    return {name: train(tmp_path_factory.mktemp(name), name, 100_000)[1] for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_change_nothing(name, whole, tmp_path):
    assert_same_fit(train(tmp_path, name, 30)[1], whole[name])


@pytest.mark.ranks
@pytest.mark.parametrize("name", KINDS)
def test_ranks_change_nothing(name, whole, by_ranks):
    assert_same_fit(torch.load(by_ranks / f"{name}.pt", weights_only=True), whole[name])


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_in_ranks("tests.training.test_weighted_steps", "rank", 2, str(folder))
    return folder


def test_weights_change_what_is_trained(whole):
    """Else the comparisons above would hold for weights that nothing reads."""
    gradients = [whole[name]["gradient"] for name in KINDS]
    assert not torch.allclose(*gradients, rtol=1e-2)
    losses = [whole[name]["figures"][0]["train/loss"] for name in ("pairs", "tokens")]
    assert losses[0] < 0.69 < losses[1]  # ln 2 times weights below 1; ln 2 and a likelihood
