"""Training: every step sees the same pairs however it is cut up, in one process and in two real ranks."""

from __future__ import annotations

import copy
import json
import math
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.core.losses import DPO
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate
from dpo_lab.data.datamodule import StepSampler
from dpo_lab.models.forward import disable_dropout, pair_logps, pair_loss
from dpo_lab.models.reference import Cached
from dpo_lab.training.optim import Decay, Optim
from tests.conftest import make_pairs
from tests.support.fits import PAIRS, flat, initial_policy, make_data, make_module, make_trainer
from tests.support.ranks import become_rank, run_in_ranks

STEPS = 5


def fit(
    folder: Path,
    tokens: int = 2048,
    devices: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    dtype=None,
    **trainer_settings,
):
    """Train a small model for STEPS steps of 8 pairs; gives its weights and the logged figures."""
    model = initial_policy().model
    module = make_module(model if dtype is None else model.to(dtype), folder, STEPS, tokens)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(STEPS, devices, **(dict(strategy=strategy, log_every_n_steps=STEPS) | trainer_settings))
    module.train()
    trainer.fit(module, datamodule=make_data(num_workers, seed))
    figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return flat(module.model.parameters()), figures, trainer


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")


def test_eight_micro_batches_are_one(tmp_path):
    whole, whole_figures, _ = fit(tmp_path)
    single, single_figures, trainer = fit(tmp_path, tokens=1)
    assert trainer.global_step == STEPS
    assert (single - whole).abs().max().item() < 1e-6
    assert single_figures == pytest.approx(whole_figures, abs=1e-5)
    assert "train/rewards/margins" in whole_figures


def test_loader_workers_change_nothing(tmp_path):
    assert torch.equal(fit(tmp_path, num_workers=2)[0], fit(tmp_path)[0])


def test_seed_decides_the_order(tmp_path):
    first, second, other = (fit(tmp_path, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert (first - other).abs().max().item() > 1e-5


def rank(number: int, world_size: int, folder: str) -> None:
    """One rank of two, as torchrun would start it."""
    become_rank(number, world_size)
    weights, figures, _ = fit(Path(folder), tokens=100, devices=world_size)
    torch.save(weights, Path(folder) / f"rank-{number}.pt")
    short, _, trainer = fit(Path(folder), tokens=100, devices=world_size, dtype=torch.bfloat16)
    masters = flat(state["master"] for state in trainer.optimizers[0].state.values())
    torch.save([short, masters], Path(folder) / f"bf16-{number}.pt")
    print("RESULT", json.dumps(figures))
    sys.stdout.flush()


def test_two_ranks_are_one(tmp_path):
    outputs = run_in_ranks("tests.training.test_training", "rank", 2, str(tmp_path))
    weights, figures, _ = fit(tmp_path)
    for number, output in enumerate(outputs):
        of_rank = torch.load(tmp_path / f"rank-{number}.pt", weights_only=True)
        assert (of_rank - weights).abs().max().item() < 1e-6
        # 7 held-out pairs over 2 ranks: each counted once
        assert json.loads(output.split("RESULT", 1)[1]) == pytest.approx(figures, abs=1e-5)
    (short, masters), (other, others) = (torch.load(tmp_path / f"bf16-{n}.pt", weights_only=True) for n in (0, 1))
    assert torch.equal(short, other)
    assert torch.equal(masters, others)


def test_gradient_is_the_mean_over_pairs(policy, pairs, tmp_path):
    """Pairs of uneven length weigh the same: a brute-force loop over single pairs gives the batch's gradient."""
    model = copy.deepcopy(policy.model)
    reference = Cached().prepare(model, pairs, tmp_path)
    with torch.no_grad():
        model.model.norm.weight *= 1.1

    def gradient(groups) -> torch.Tensor:
        model.zero_grad()
        for group in groups:
            batch = collate(group)
            total, _ = pair_loss(model, batch, DPO(0.5), reference(batch))
            (total / len(pairs)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together, one_by_one = gradient([pairs]), gradient([[p] for p in pairs])
    assert (together - one_by_one).norm() / together.norm() < 1e-6


def test_bf16_runs_and_stays_near_fp32(tmp_path):
    _, exact, _ = fit(tmp_path)
    _, half, _ = fit(tmp_path, precision="bf16-mixed")
    assert half["train/loss"] == pytest.approx(exact["train/loss"], abs=0.05)


SIZES = [p.size for p in make_pairs(PAIRS)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_steps_hold_the_same_pairs_for_any_ranks(world_size):
    steps_per_epoch = PAIRS // 8

    def steps(world_size: int, start: int = 0) -> list[list[list[int]]]:
        ranks = []
        for number in range(world_size):
            sampler = StepSampler(SIZES, 8, seed=5, rank=number, world_size=world_size, start=start)
            ranks.append(list(islice(sampler, 3 * steps_per_epoch - start)))
            assert ranks[-1] == [
                sampler.step(step) for step in range(start, 3 * steps_per_epoch)
            ]  # without those before
        return [list(parts) for parts in zip(*ranks, strict=True)]

    dealt, whole = steps(world_size), steps(1)
    pairs = [sorted(pair for part in step for pair in part) for step in dealt]
    assert pairs == [sorted(step[0]) for step in whole]
    assert [len(step) for step in pairs] == [8] * 3 * steps_per_epoch
    for epoch in range(3):  # no pair twice
        assert len({pair for step in pairs[epoch * steps_per_epoch :][:steps_per_epoch] for pair in step}) == 24
    for step in dealt:
        assert all(step)
        tokens = [sum(SIZES[pair] for pair in part) for part in step]
        assert max(tokens) - min(tokens) <= max(SIZES)
    assert whole[:steps_per_epoch] != whole[steps_per_epoch : 2 * steps_per_epoch]
    for start in (1, steps_per_epoch, steps_per_epoch + 2):  # going on from any step is going on
        assert steps(world_size, start) == dealt[start:]


def test_every_epoch_is_another_permutation_and_the_first_is_as_it_always_was(tmp_path):
    """What the trainer is given, not what a sampler could give: a second epoch in the order of the first shows here."""
    seen: list[list[str]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch.keys)

    fit(tmp_path, callbacks=[Watch()])
    sampler = StepSampler(SIZES, 8, seed=0)
    assert seen == [[f"pair-{i}" for i in sampler.step(step)] for step in range(STEPS)]
    generator = torch.Generator().manual_seed(derive_seed(0, "order/0"))
    order = torch.randperm(PAIRS, generator=generator).tolist()
    assert [sorted(keys) for keys in seen[:3]] == [sorted(f"pair-{i}" for i in order[k * 8 :][:8]) for k in range(3)]
    assert sorted(seen[3]) != sorted(seen[0])


def test_the_order_of_pairs_does_not_depend_on_their_sizes():
    def drawn(sizes: list[int]) -> list[set[int]]:
        return [set(step) for step in islice(StepSampler(sizes, 8, seed=5), 6)]

    assert drawn(SIZES) == drawn([1] * PAIRS)


def test_checkpointing_runs_without_dropout(policy):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            attention_dropout=0.5, pad_token_id=0,
        )
    )  # fmt: skip
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    disable_dropout(model)
    batch = collate(make_pairs(3))
    first, second = pair_logps(model, batch), pair_logps(model, batch)
    assert torch.equal(first.chosen, second.chosen)
    calls.clear()
    pair_logps(model, batch).chosen.sum().backward()
    assert len(calls) == 2  # in the forward, and once more in the backward


def test_schedule():
    optim = Optim(lr=1.0, warmup_steps=4, decay=Decay.linear)
    assert [optim.factor(s, 8) for s in range(9)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0])
    cosine = Optim(lr=1.0, warmup_steps=0, decay=Decay.cosine)
    assert [cosine.factor(s, 4) for s in range(5)] == pytest.approx(
        [1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 0]
    )


def test_weight_decay_spares_norms(policy):
    optimizer, _ = Optim(weight_decay=0.1).build(policy.model.parameters(), 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in policy.model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"lr": math.nan}, {"beta2": 1.0}, {"warmup_steps": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"optim.{next(iter(settings))}"):
        Optim(**settings)
