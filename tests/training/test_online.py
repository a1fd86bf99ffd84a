"""Online training: resumed bit by bit, the same for any micro-batches and ranks, gradients as by brute force."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dpo_lab.core.logps import pad_rows
from dpo_lab.core.losses import LOSSES
from dpo_lab.core.methods.grpo import GRPO, KLPrice, Normalise
from dpo_lab.core.methods.online_dpo import OnlineDPO
from dpo_lab.core.methods.ppo import PPO
from dpo_lab.core.methods.rloo import RLOO
from dpo_lab.data.datamodule import StepSampler
from dpo_lab.models.forward import disable_dropout
from dpo_lab.models.paths import apply_path, path_of
from dpo_lab.models.reference import Moving
from dpo_lab.training.optim import Optim
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from tests.support.fits import flat
from tests.support.online_fit import prepare, reward
from tests.support.ranks import become_rank, run_in_ranks
from tests.support.small_fit import IGNORED, cut, difference, left, run

pytestmark = [pytest.mark.filterwarnings(each) for each in (*IGNORED, "ignore:.*gradient_checkpointing:FutureWarning")]

SIZES = dict(prompts=4, samples=2)
METHODS = {
    "rloo": RLOO(**SIZES),
    "grpo": GRPO(**SIZES, epochs=3, normalise=Normalise.token),
    "ppo": PPO(**SIZES, epochs=2, minibatches=2, kl_target=0.1),
    "online_dpo": OnlineDPO(**SIZES),
}


def fitted(folder: Path, name: str, **settings):
    return run(folder, prepare=prepare(METHODS[name], **settings.pop("parts", {})), **settings)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.extended), 3, pytest.param(4, marks=pytest.mark.extended)]
)
def test_a_crash_changes_nothing(name, step, tmp_path):
    """A checkpoint is written every 2 steps: GRPO's and PPO's rollouts, of 3 and 4 steps, are in it."""
    fitted(tmp_path / "whole", name)
    cut(tmp_path / "cut", step, prepare=prepare(METHODS[name]))
    fitted(tmp_path / "cut", name)
    assert difference(left(tmp_path / "whole"), left(tmp_path / "cut")) is None


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (RLOO(**SIZES), {"reference": Moving(every=2)}),
        (OnlineDPO(**SIZES), {"loss": LOSSES["aot"](0.5)}),
        (OnlineDPO(**SIZES), {"loss": LOSSES["kto"](0.5)}),
        (PPO(**SIZES), {}),
    ],
    ids=["moving reference", "loss of a whole step", "loss of mismatched responses", "adapters"],
)
def test_a_crash_changes_nothing_with(method, parts, tmp_path):
    settings = dict(prepare=prepare(method, **parts), adapters=None if parts else torch.float32)
    run(tmp_path / "whole", **settings)
    cut(tmp_path / "cut", 5, **settings)
    run(tmp_path / "cut", **settings)
    assert difference(left(tmp_path / "whole"), left(tmp_path / "cut")) is None


def outcome(trainer) -> tuple[torch.Tensor, dict[str, float]]:
    module = trainer.lightning_module
    return flat(p for p in module.parameters() if p.requires_grad), {
        name: value.item() for name, value in trainer.callback_metrics.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(name, tmp_path):
    def with_tokens(tokens: int):
        make = prepare(METHODS[name])
        return lambda *args, **step: make(*args, **(step | {"tokens_per_microbatch": tokens}))

    (whole, figures), (single, others) = (
        outcome(run(tmp_path / str(tokens), prepare=with_tokens(tokens), steps=4)) for tokens in (2048, 1)
    )
    assert (whole - single).abs().max().item() < 1e-5
    assert others == pytest.approx(figures, abs=1e-4)
    assert {"train/rollout/reward", "train/rollout/gold", "train/rollout/samples"} <= figures.keys()


def rank(number: int, world_size: int, folder: str) -> None:
    become_rank(number, world_size)
    found = {}
    for name in METHODS:
        weights, figures = outcome(fitted(Path(folder) / f"ranks-{name}", name, devices=world_size, steps=4))
        torch.save(weights, Path(folder) / f"{name}-{number}.pt")
        found[name] = figures
    print("RESULT", json.dumps(found), flush=True)


def test_two_ranks_are_one(tmp_path):
    outputs = run_in_ranks("tests.training.test_online", "rank", 2, str(tmp_path))
    for name in METHODS:
        weights, figures = outcome(fitted(tmp_path / name, name, steps=4))
        for number, output in enumerate(outputs):
            of_rank = torch.load(tmp_path / f"{name}-{number}.pt", weights_only=True)
            assert (of_rank - weights).abs().max().item() < 1e-5
            assert json.loads(output.split("RESULT", 1)[1])[name] == pytest.approx(figures, abs=1e-4)


def sharded_rank(number: int, world_size: int, folder: str, *names: str) -> None:
    become_rank(number, world_size)
    found, place = {}, Path(folder)
    for name in names:
        method, sharded = name.partition(" ")[0], {"strategy": FSDP2Strategy(), "devices": world_size}
        trainer = fitted(place / f"sharded-{name}", method, steps=4, **sharded, **SETTINGS.get(name, {}))
        weights, figures = outcome(trainer)
        assert all(isinstance(weight, DTensor) for weight in trainer.lightning_module.parameters())
        torch.save(weights, place / f"{name}-{number}.pt")
        found[name] = figures
    print("RESULT", json.dumps(found), flush=True)


SETTINGS: dict[str, Any] = {"ppo adapters": {"adapters": torch.float32}}
REST = ["online_dpo", "grpo", "ppo adapters", "ppo resumed"]


@pytest.mark.parametrize("names", [["rloo", "ppo"], pytest.param(REST, marks=pytest.mark.extended)], ids=str)
def test_sharded_over_two_ranks_is_one_process(names, tmp_path):
    """Ranks have different numbers of micro-batches, and one of them samples no response, so that it takes part idly.

    Resumed: from a checkpoint of one process, within a rollout.
    """
    if "ppo resumed" in names:
        cut(tmp_path / "sharded-ppo resumed", 3, steps=4, prepare=prepare(METHODS["ppo"]))
    outputs = run_in_ranks("tests.training.test_online", "sharded_rank", 2, str(tmp_path), *names)
    for name in names:
        one = fitted(tmp_path / name, name.partition(" ")[0], steps=4, **SETTINGS.get(name, {}))
        weights, figures = outcome(one)
        for number, output in enumerate(outputs):
            of_rank = torch.load(tmp_path / f"{name}-{number}.pt", weights_only=True)
            assert (of_rank - weights).abs().max().item() < 1e-5, name
            found = json.loads(output.split("RESULT", 1)[1])[name]
            assert {"train/policy_loss", "train/loss"} & found.keys()
            assert found == pytest.approx({key: figures.get(key, found[key]) for key in found}, abs=1e-4), name


def test_checkpointed_layers_stay_so_when_the_policy_has_sampled():
    """transformers checkpoints layers in train mode alone, and samples with a cache in evaluation mode alone."""
    model = make_model()
    model.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model)
    _, data = prepare(RLOO(**SIZES))(model, make_optim(), total_steps=4, tokens_per_microbatch=40)
    data.batch(0)
    assert model.model.layers[0].training
    assert not model.training


def test_each_step_has_the_same_prompts_and_samples_whatever_ran_before(tmp_path):
    """Rollout n is a function of (seed, n) and the policy: steps of one rollout share it, each trains on its own part."""
    _, data = prepare(METHODS["ppo"])(make_model(), make_optim(), total_steps=4, tokens_per_microbatch=40)
    parts = [data.batch(step) for step in range(5)]
    first_epoch, second_epoch = ({*parts[i].keys, *parts[i + 1].keys} for i in (0, 2))
    assert first_epoch == second_epoch
    assert len(first_epoch) == 4
    assert {*parts[4].keys} != {*parts[0].keys}
    again = prepare(METHODS["ppo"])(make_model(), make_optim(), total_steps=4, tokens_per_microbatch=40)[1]
    assert torch.equal(again.batch(0).tokens, parts[0].tokens)


def make_model():
    from dpo_lab.models.forward import select_forward
    from dpo_lab.models.policy import TinyPolicy
    from tests.support.small_fit import TOKENIZER

    model = TinyPolicy(hidden_size=8, layers=1, heads=2, intermediate_size=8).build(TOKENIZER, seed=0)
    select_forward(model)
    return model


def make_optim():
    return Optim(lr=1e-2, warmup_steps=0)


@pytest.mark.parametrize(
    "method",
    [
        RLOO(**SIZES),
        GRPO(**SIZES, normalise=Normalise.sequence, kl=KLPrice.k3),
        GRPO(**SIZES, normalise=Normalise.constant, kl=KLPrice.reward),
        PPO(**SIZES, minibatches=1, epochs=1),
    ],
    ids=["rloo", "grpo", "dr grpo", "ppo"],
)
def test_gradient_is_that_of_padded_rows(method):
    """The fused head on packed responses, against transformers' logits of each response's own row and autograd."""
    model = make_model()
    module, data = prepare(method)(model, make_optim(), total_steps=4, tokens_per_microbatch=4096)
    batch = data.batch(0)
    with torch.no_grad():  # a ratio other than 1
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    module.train_metrics.reset()
    module.part_loss(batch).backward()
    found = flat(weight.grad for weight in module.parameters() if weight.grad is not None)
    module.zero_grad()
    rows, labels = pad_rows(batch.tokens, batch.lengths, pad_id=0)
    picked = labels[:, 1:] != -100
    hidden = model.model(rows).last_hidden_state[:, :-1]
    logps = torch.log_softmax(model.lm_head(hidden), -1).gather(2, rows[:, 1:, None])[..., 0]
    order = torch.arange(8).view(2, 4).T.flatten()  # rows of all first responses come first
    by_response = [logps[row][picked[row]] for row in order]
    loss = method.loss(torch.cat(by_response), batch).sum()
    if module.critic is not None:
        states = module.critic.model.model(rows).last_hidden_state[:, :-1]
        values = [module.critic.model.value_head(states[row][picked[row]])[:, 0] for row in order]
        loss = loss + method.value_loss(torch.cat(values), batch).sum()
    loss.backward()
    expected = flat(weight.grad for weight in module.parameters() if weight.grad is not None)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_training_raises_the_reward(tmp_path):
    """The share of even tokens, by 40 steps of RLOO at a small price."""
    method = RLOO(prompts=8, samples=4, beta=0.01)
    settings = dict(optim=Optim(lr=5e-2, warmup_steps=2), val_check_interval=40, log_every_n_steps=10)
    trainer = run(tmp_path, prepare=prepare(method), steps=40, **settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["train/rollout/reward"] for row in rows if "train/rollout/reward" in row]
    assert rewards[-1] > rewards[0] + 0.2
    kl = [row["train/rollout/kl"] for row in rows if "train/rollout/kl" in row]
    assert kl[-1] > kl[0]
    assert trainer.datamodule.samples == 40 * 32
    assert reward([[1]], [[2, 4, 5, 6]]) == [0.75]


def test_a_response_without_an_end_token_is_worth_less():
    def rewards(penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        method = RLOO(**SIZES, missing_end_penalty=penalty)
        _, data = prepare(method)(make_model(), make_optim(), total_steps=4, tokens_per_microbatch=40)
        vars(data.actor.encoder)["end_ids"] = tuple(range(50))  # a cached property
        data.batch(0)
        return data.rollouts.rewards, data.rollouts.stopped

    plain, stopped = rewards(0.0)
    assert 0 < stopped.sum() < stopped.numel()
    torch.testing.assert_close(rewards(0.75)[0], plain - 0.75 * ~stopped)


@pytest.mark.parametrize("longest", [None, 1000], ids=["as sampled", "by a pass"])
def test_actor_measures_what_models_say(longest):
    """Behaviour and reference are the log-probabilities of single rows; rewards are those of the responses.

    longest: a row of so many tokens would have other angles than those of its batch, see ForwardPath.
    """
    model = make_model()
    apply_path(model, replace(path_of(model), longest=longest))
    _, data = prepare(RLOO(**SIZES))(model, make_optim(), total_steps=4, tokens_per_microbatch=40)
    rollouts = data.batch(0)
    with torch.no_grad(), nullcontext():
        at = row = 0
        for prompt in range(4):
            lengths = rollouts.lengths[prompt].tolist()
            parts = rollouts.tokens[at : at + sum(lengths)].split(lengths)
            at += sum(lengths)
            for k, response in enumerate(parts[1:]):
                logits = model(torch.cat((parts[0], response))[None]).logits[0].log_softmax(-1)
                alone = logits[len(parts[0]) - 1 : -1].gather(1, response[:, None])[:, 0]
                torch.testing.assert_close(rollouts.behaviour[row : row + len(response)], alone, atol=1e-5, rtol=0)
                row += len(response)
                assert rollouts.rewards[prompt, k].item() == pytest.approx(reward([0], [response.tolist()])[0])
    if longest:
        assert torch.equal(rollouts.behaviour, rollouts.reference)
    torch.testing.assert_close(rollouts.behaviour, rollouts.reference, atol=1e-5, rtol=0)
    everyone = StepSampler(data.rollouts.sizes, 4, 0).step(0)
    assert sorted(everyone) == [0, 1, 2, 3]
