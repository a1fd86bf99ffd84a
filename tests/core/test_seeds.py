"""One seed, one story: under every arm the same pairs, in the same order, and the same prompts to answer at the end."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch

from dpo_lab.config import schema
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, prepare_pairs
from tests.conftest import SMALL
from tests.support.configs import settled

pytestmark = pytest.mark.slow

ARMS = {path.stem: [f"+ablation={path.stem}"] for path in sorted((Path(schema.conf_dir()) / "ablation").glob("*.yaml"))}
ARMS |= {"beta": ["beta=0.5"], "rate": ["optim.lr=1e-5"], "ranks": ["trainer=ddp_cpu"]}
# One for each axis that an ablation changes; the others, most of them losses, run in `make test-all`.
QUICK = {"none", "ipo", "simpo", "uniform_ref", "label_noise", "no_sft", "beta", "rate", "ranks"}


def settings(*overrides: str) -> schema.RunConfig:
    return settled(*SMALL, *overrides)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def inputs_of(cache: Path, *overrides: str) -> TrainingInputs:
    return prepare_pairs(settings(*overrides), cache, Forward(torch.device("cpu"), nullcontext))


def drawn_from(made: TrainingInputs, *overrides: str) -> dict[str, list]:
    chosen = settings(*overrides)
    loader = PreferenceDataModule(
        made.train, made.held_out, batch_size=chosen.data.batch_size, num_workers=0, seed=chosen.seed
    ).train_dataloader()
    return {
        "train": made.train.keys.tolist(),
        "held out": made.held_out.keys.tolist(),
        "order": [batch.keys for batch in islice(loader, 20)],
        "prompts": chosen.data.task.prompts(HELD_OUT, chosen.evals.num_prompts, chosen.seed),
    }


@pytest.fixture(scope="module")
def baseline(cache) -> dict[str, list]:
    return drawn_from(inputs_of(cache))


@pytest.mark.parametrize("arm", [a if a in QUICK else pytest.param(a, marks=pytest.mark.extended) for a in ARMS])
def test_arms_are_paired(arm, cache, baseline):
    made = inputs_of(cache, *ARMS[arm])
    assert drawn_from(made, *ARMS[arm]) == baseline
    flipped = made.train.flipped.mean()
    assert 0.1 < flipped < 0.3 if arm == "label_noise" else flipped == 0
    assert not made.held_out.flipped.any()


def test_another_seed_changes_pairs_order_and_prompts(cache, baseline):
    other = drawn_from(inputs_of(cache, "seed=1"), "seed=1")
    assert {part for part in baseline if other[part] == baseline[part]} == set()
    assert not set(other["train"]) & set(baseline["train"])


def test_streams_of_one_seed_are_their_own():
    names = ["init", "order/0", "order/1", "sft/order", "world/annotator/train", "evaluation/initial"]
    assert len({derive_seed(seed, name) for seed in range(100) for name in names}) == 100 * len(names)
    assert derive_seed(0, "order/0") == derive_seed(0, "order/0")
