"""data.tokens_per_microbatch=auto: what fits is found by few trials, is the same on all ranks, and leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dpo_lab.config.schema import ConfigError
from dpo_lab.core.losses import DPO
from dpo_lab.core.methods import METHODS
from dpo_lab.core.methods.online_dpo import Candidates
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.data.sources import FORWARD_TOKENS
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.reference import Uniform
from dpo_lab.pipelines.session import Session
from dpo_lab.runs.out_of_memory import OutOfMemory
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.microbatch import STEP, find_tokens, probe_of, tokens_that_fit
from dpo_lab.training.optim import Optim
from dpo_lab.training.rng_state import metric_state
from tests.conftest import make_pairs
from tests.support import online_fit
from tests.support.configs import settled
from tests.support.ranks import become_rank, run_in_ranks

CPU = torch.device("cpu")
MOST = 100_000  # tokens of a step


class Card:
    """A probe of a card with so much memory: `fixed` bytes, and `each` a token; it fails beyond `limit` bytes."""

    def __init__(self, limit: int, fixed: int = 1_000_000, each: int = 100, bends: int = MOST) -> None:
        self.limit, self.fixed, self.each, self.bends, self.tried = limit, fixed, each, bends, []

    def __call__(self, tokens: int) -> int:
        self.tried.append(tokens)
        peak = self.fixed + self.each * tokens + 10 * self.each * max(0, tokens - self.bends)
        if peak > self.limit:
            raise OutOfMemory("out of memory in a trial")
        return peak


@pytest.mark.parametrize("fits", [256, 300, 1500, 2048, 3000, 5000, 20_000, 99_000])
def test_nearly_what_fits_is_found_in_few_trials(fits):
    card = Card(limit=1_000_000 + 100 * fits)
    found = tokens_that_fit(card, card.limit, MOST)
    assert fits / 2 <= found <= fits
    assert found == fits // STEP * STEP or fits < 2 * FORWARD_TOKENS  # between two failures it is not refined
    assert len(card.tried) <= 5


def test_the_budget_counts_where_the_card_has_more():
    card = Card(limit=10**9)
    assert tokens_that_fit(card, 1_000_000 + 100 * 6400, MOST) == 6400


def test_it_goes_back_where_memory_grows_faster_than_two_trials_tell():
    card = Card(limit=1_000_000 + 100 * 20_000, bends=9000)
    found = tokens_that_fit(card, card.limit, MOST)
    assert 4096 < found <= 10_000
    assert card.fixed + 100 * found + 1000 * max(0, found - 9000) <= card.limit


def test_no_more_than_a_step_has():
    assert tokens_that_fit(Card(10**9), 10**9, 5000) == 5000
    assert tokens_that_fit(Card(10**9), 10**9, 700) == 700


def test_a_card_on_which_nothing_fits_ends_in_one_line():
    with pytest.raises(OutOfMemory, match="type policy.gradient_checkpointing=true, or policy.lora.r=16 optim=lora$"):
        tokens_that_fit(Card(10), 10, MOST)


def rank(number: int, world_size: int) -> None:
    become_rank(number, world_size)
    torch.distributed.init_process_group("gloo", rank=number, world_size=world_size)
    card = Card(limit=1_000_000 + 100 * (6400, 3000)[number])
    print("found:", tokens_that_fit(card, card.limit, MOST))
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_the_fewest():
    outputs = run_in_ranks("tests.training.test_microbatch", "rank", 2)
    assert [output.split("found:")[1].strip() for output in outputs] == ["2048", "2048"]


def data_of(pairs) -> PreferenceDataModule:
    return PreferenceDataModule(pairs, [], batch_size=4, num_workers=0, seed=0)


def test_no_micro_batch_is_larger_than_a_ranks_part_of_a_step():
    data = data_of(make_pairs(6))
    longest = sorted((pair.size for pair in data.train), reverse=True)
    assert [data.most_tokens(world_size) for world_size in (1, 2, 3)] == [sum(longest[:n]) for n in (4, 2, 2)]


@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo", "online_dpo"])
def test_a_method_that_samples_is_tried_on_its_longest_rollouts(name, policy):
    compared = {"candidates": Candidates.extremes} if name == "online_dpo" else {}
    method = METHODS[name](prompts=4, minibatches=2, samples=3, **compared)
    step = dict(total_steps=3, tokens_per_microbatch=40)
    model = trainable_copy(policy.model)
    select_forward(model)
    module, data = online_fit.prepare(method)(model, Optim(), **step)
    responses = 2 if name == "online_dpo" else 3
    most = max(map(len, data.prompts)) + responses * online_fit.LONGEST
    assert [data.most_tokens(world_size) for world_size in (1, 2)] == [2 * most, most]
    assert probe_of(module, data.trial_batch, CPU, nullcontext)(2 * most) > 0
    for asked, given in ((1, 1), (2 * most - 1, 1), (2 * most, 2)):
        batch = data.trial_batch(asked)
        assert len(batch) == given
        assert len(batch.tokens) == given * most
        assert (batch.lengths[:, 1:] == online_fit.LONGEST).all()


@pytest.fixture
def module(policy, tmp_path) -> DPOModule:
    model = trainable_copy(policy.model).train()
    reference = Uniform().prepare(model, [], tmp_path)
    sizes = dict(total_steps=3, batch_size=4, tokens_per_microbatch=40)
    return DPOModule(model, DPO(0.1), reference, Optim(), **sizes)


def test_a_trial_runs_forward_and_backward_and_leaves_no_trace(module, monkeypatch):
    part_loss, seen = module.part_loss, []

    def spy(part):
        seen.append((len(part.tokens), torch.rand(3), module.model.training))
        return part_loss(part)

    monkeypatch.setattr(module, "part_loss", spy)
    handles = [p.register_hook(lambda grad: seen.append("gradient")) for p in module.model.parameters()]
    before = (torch.get_rng_state(), [p.clone() for p in module.parameters()], metric_state(module.train_metrics))
    pairs = make_pairs(6)
    assert probe_of(module, data_of(pairs).trial_batch, CPU, nullcontext)(1000) > 0
    assert 1000 - max(pair.size for pair in pairs) < seen[0][0] <= 1000
    assert seen[0][2] is False  # without dropout, as in training
    assert seen.count("gradient") == len(handles)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before[1], strict=True))
    assert all(p.grad is None for p in module.parameters())
    assert all(m.training for m in module.model.modules())
    after = metric_state(module.train_metrics)
    assert after["updates"] == before[2]["updates"] == 0
    assert all(torch.equal(after["values"][name], value) for name, value in before[2]["values"].items())


def test_a_trial_that_runs_out_of_memory_says_so_and_leaves_no_trace(module, monkeypatch):
    def fail(part):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "part_loss", fail)
    with pytest.raises(OutOfMemory, match="a trial"):
        probe_of(module, data_of(make_pairs(2)).trial_batch, CPU, nullcontext)(100)
    assert all(m.training for m in module.model.modules())


def test_without_a_gpu_it_is_the_default(module, caplog):
    caplog.set_level("INFO", "dpo_lab")
    assert find_tokens(module, data_of(make_pairs(2)), 1, CPU, nullcontext) == FORWARD_TOKENS
    assert "data.tokens_per_microbatch=auto: 2048, the default" in caplog.text


def session_of(record: dict) -> Session:
    """A session with this record; what it records is added to it."""
    run = SimpleNamespace(record=record, update=record.update)
    trainer = SimpleNamespace(
        is_global_zero=True, world_size=1, strategy=SimpleNamespace(broadcast=lambda decision: decision)
    )
    session = object.__new__(Session)
    vars(session).update(
        config=settled("data.tokens_per_microbatch=auto"),
        run=run,
        trainer=trainer,
        forward=SimpleNamespace(device=CPU, context=nullcontext),
    )
    return session


def test_what_was_found_is_recorded_and_a_resumed_run_takes_it(module, monkeypatch):
    record: dict = {}
    data = data_of(make_pairs(2))
    session_of(record)._choose_memory(module, data)
    assert record == {"tokens_per_microbatch": FORWARD_TOKENS}
    monkeypatch.setattr("dpo_lab.pipelines.session.find_tokens", None)  # a search would fail
    session_of({"tokens_per_microbatch": 777})._choose_memory(module, data)
    assert module.tokens_per_microbatch == 777


def test_what_it_can_be_is_said():
    assert settled("data.tokens_per_microbatch=auto").data.forward_tokens == FORWARD_TOKENS
    assert settled("data.tokens_per_microbatch=300").data.forward_tokens == 300
    for value in ("many", "0"):
        with pytest.raises(ConfigError, match=r"data\..*; type"):
            settled(f"data.tokens_per_microbatch={value}")
    with pytest.raises(ConfigError, match="auto: its trials run before the model is sharded; type a number"):
        settled("data.tokens_per_microbatch=auto", "trainer=fsdp_cpu")
