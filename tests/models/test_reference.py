"""References: all kinds that start at the policy agree with it; the cache is keyed, verified, shared and complete."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open

from dpo_lab.core.losses import DPO, DPOKL, DPOP, RPO
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.models import reference_cache
from dpo_lab.models.forward import pair_logps, select_forward
from dpo_lab.models.reference import Cached, Frozen, Uniform, UniformOver
from dpo_lab.training import step_zero
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from dpo_lab.training.step_zero import StepZeroError, check_step_zero
from tests.conftest import make_pairs
from tests.support.ranks import run_in_ranks


@pytest.mark.parametrize("kind", [Frozen(), Cached()])
def test_anchored_references_agree_with_the_policy_at_step_zero(kind, policy, pairs, tmp_path):
    reference = kind.prepare(policy.model, pairs, tmp_path)
    loss = check_step_zero(policy.model, DPO(0.5), reference, collate(pairs))
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_cached_is_frozen(policy, pairs, tmp_path):
    cached, frozen = (kind.prepare(policy.model, pairs, tmp_path, tokens=100) for kind in (Cached(), Frozen()))
    batch = collate(pairs[3:9])
    assert cached(batch).chosen.tolist() == pytest.approx(frozen(batch).chosen.tolist(), rel=1e-5)
    assert cached(batch).rejected.tolist() == pytest.approx(frozen(batch).rejected.tolist(), rel=1e-5)


def test_cache_is_swapped_with_label_noise(policy, pairs, tmp_path):
    noisy = [p.flip() if i % 2 else p for i, p in enumerate(pairs)]
    from_noisy = Cached().prepare(policy.model, noisy, tmp_path)
    from_clean = Cached().prepare(policy.model, pairs, tmp_path)
    assert from_noisy.path == from_clean.path  # noise is in the labels, not in the model: one file serves all rates
    with torch.no_grad():
        expected = pair_logps(policy.model, collate(noisy))
    assert from_clean(collate(noisy)).chosen.tolist() == pytest.approx(expected.chosen.tolist(), rel=1e-5)


def test_uniform_over_sequences_cancels(policy, pairs, tmp_path):
    logps = Uniform().prepare(policy.model, pairs, tmp_path)(collate(pairs))
    assert logps.margin.tolist() == [0.0] * len(pairs)


def test_uniform_over_tokens_counts_tokens(policy, tmp_path):
    pair = EncodedPair("a", [3], [4, 5], [6, 7, 8])
    logps = Uniform(UniformOver.tokens).prepare(policy.model, [pair], tmp_path)(collate([pair]))
    per_token = math.log(policy.model.config.vocab_size)
    assert (logps.chosen.item(), logps.rejected.item()) == pytest.approx((-2 * per_token, -3 * per_token))


def test_uniform_runs_no_model_and_keeps_none(policy, pairs, tmp_path):
    broken = copy.copy(policy.model)
    broken.forward = None  # any forward would fail
    reference = Uniform().prepare(broken, pairs, tmp_path)
    reference(collate(pairs))
    assert not any(isinstance(value, torch.nn.Module) for value in vars(reference).values())
    assert list(tmp_path.iterdir()) == []


def test_cache_key_holds_all_that_changes_a_row(policy, pairs, tmp_path):
    changed_model = copy.deepcopy(policy.model)
    with torch.no_grad():
        changed_model.model.norm.weight[0] += 1e-3
    longer = [*pairs[:-1], EncodedPair(pairs[-1].key, pairs[-1].prompt, [*pairs[-1].chosen, 9], pairs[-1].rejected)]
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    made = [
        reference_cache.cached_logps(model, rows, tmp_path, context, 8).path
        for model, rows, context in (
            (policy.model, pairs, nullcontext),
            (changed_model, pairs, nullcontext),
            (policy.model, longer, nullcontext),
            (policy.model, pairs[:-1], nullcontext),
            (policy.model, pairs, autocast),
        )
    ]
    assert len(set(made)) == len(made)


def test_second_start_reads_the_file(policy, pairs, tmp_path, monkeypatch):
    first = Cached().prepare(policy.model, pairs, tmp_path)
    monkeypatch.setattr(reference_cache, "_compute", None)  # any computing would fail
    assert torch.equal(Cached().prepare(policy.model, pairs, tmp_path).rows, first.rows)


@pytest.mark.parametrize("damage", ["truncated", "bit", "other"])
def test_damaged_cache_is_made_again_loudly(damage, policy, pairs, tmp_path, caplog):
    first = Cached().prepare(policy.model, pairs, tmp_path)
    content = first.path.read_bytes()
    other = Cached().prepare(policy.model, pairs[:5], tmp_path)
    first.path.write_bytes(
        {
            "truncated": content[:-7],
            "bit": content[:-3] + bytes([content[-3] ^ 64]) + content[-2:],
            "other": other.path.read_bytes(),
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        again = Cached().prepare(policy.model, pairs, tmp_path)
    assert torch.equal(again.rows, first.rows)
    assert str(first.path) in caplog.text


def test_missing_row_raises(policy, pairs, tmp_path):
    reference = Cached().prepare(policy.model, pairs[:6], tmp_path)
    with pytest.raises(KeyError, match="pair-7"):
        reference(collate(pairs[7:8]))


def build_cache(rank: int, world_size: int, folder: str) -> None:
    """Both processes ask at once; prints whether this one computed."""
    from pathlib import Path

    from tests.conftest import TinyPolicy, train_tokenizer

    tokenizer = train_tokenizer(["the plot was good"], 300)
    model = TinyPolicy(hidden_size=32, layers=1, heads=4, intermediate_size=32).build(tokenizer, seed=0)
    computed: list[int] = []
    compute = reference_cache._compute
    reference_cache._compute = lambda *a: computed.append(1) or compute(*a)
    rows = Cached().prepare(model, make_pairs(40, vocabulary=250), Path(folder)).rows
    print("RESULT", json.dumps([len(computed), rows.sum().item()]))


def test_two_processes_make_one_cache(tmp_path):
    outputs = run_in_ranks("tests.models.test_reference", "build_cache", 2, str(tmp_path))
    results = [json.loads(o.split("RESULT", 1)[1]) for o in outputs]
    assert sum(computed for computed, _ in results) == 1
    assert results[0][1] == results[1][1]
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 1


def test_cache_holds_sums_and_no_pickle(policy, pairs, tmp_path):
    reference = Cached().prepare(policy.model, pairs, tmp_path)
    with safe_open(reference.path, framework="pt") as file:
        assert list(file.keys()) == ["logps"]


def test_a_loss_of_more_than_margins_starts_where_its_formula_says(policy, pairs, tmp_path):
    """DPOP's price and that on drift are nothing at the start; RPO has the likelihood of the chosen responses, a token's."""
    reference, batch = Cached().prepare(policy.model, pairs, tmp_path), collate(pairs)
    first = {loss: check_step_zero(policy.model, loss(beta=0.5), reference, batch) for loss in (DPOP, DPOKL, RPO)}
    with torch.no_grad():
        per_token = pair_logps(policy.model, batch).per_token().chosen.mean().item()
    assert first == pytest.approx({DPOP: math.log(2), DPOKL: math.log(2), RPO: math.log(2) - per_token}, abs=1e-5)
    reference.rows[4] += 0.5  # both sides alike: no margin tells, DPOP's price does
    with pytest.raises(StepZeroError, match="pair-4"):
        check_step_zero(policy.model, DPOP(0.5), reference, batch)


def test_step_zero_check_names_the_pair(policy, pairs, tmp_path):
    reference = Cached().prepare(policy.model, pairs, tmp_path)
    reference.rows[4, 0] += 0.5
    with pytest.raises(StepZeroError, match="pair-4"):
        check_step_zero(policy.model, DPO(0.1), reference, collate(pairs))


def in_bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def sharp(policy):
    """A policy with large weights, whose log-probabilities bf16 changes visibly."""
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        model.lm_head.weight *= 12
        for layer in model.model.layers:
            for part, factor in (("q_proj", 10), ("k_proj", 10), ("v_proj", 5)):
                getattr(layer.self_attn, part).weight *= factor
    return model


@pytest.fixture(scope="module")
def long_pairs() -> list[EncodedPair]:
    random = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=random).tolist()

    return [EncodedPair(f"long-{n}", tokens(7), tokens(n), tokens(n)) for n in (1, 2, 9, 60, 280)]


@pytest.mark.parametrize("beta", [0.01, 1.0, 50.0])
def test_two_ways_to_compute_in_bf16_agree_at_step_zero(beta, sharp, long_pairs, tmp_path):
    """Padded rows in small batches, by another kernel, made the cache; shared prompts pass at any beta and length."""
    padded, shared = copy.deepcopy(sharp), copy.deepcopy(sharp)
    padded.set_attn_implementation("eager")
    reference = Cached().prepare(padded, long_pairs, tmp_path, in_bf16, tokens=100)
    select_forward(shared)
    with in_bf16(), torch.no_grad():
        loss = check_step_zero(shared, DPO(beta), reference, collate(long_pairs), 700)
        off = pair_logps(shared, collate(long_pairs)).margin - reference(collate(long_pairs)).margin
    assert off.abs().max() > 0.05  # they are not the same
    assert loss == pytest.approx(math.log(2), abs=beta * off.abs().max().item())


@pytest.mark.parametrize("wrong", ["policy", "row", "side"])
@pytest.mark.parametrize("context", [nullcontext, in_bf16])
def test_another_reference_is_refused_at_step_zero(wrong, context, sharp, long_pairs, tmp_path):
    other = copy.deepcopy(sharp)
    if wrong == "policy":
        with torch.no_grad():
            other.model.norm.weight[:8] = 0.5
    reference = Cached().prepare(other, long_pairs, tmp_path, context)
    if wrong == "row":
        reference.rows[[0, 2]] = reference.rows[[2, 0]]
    if wrong == "side":
        reference.rows = reference.rows.flip(1)
    with context(), pytest.raises(StepZeroError) as refused:
        check_step_zero(sharp, DPO(0.01), reference, collate(long_pairs))
    dtype = "float32" if context is nullcontext else "bfloat16"
    said = r"pair long-\d+, (chosen|rejected) response of \d+ tokens: its log-probability differs by \S+ nats per token"
    said += rf" \(tolerance of {dtype}: \S+\);"
    assert re.search(said, str(refused.value))
    assert str(refused.value).endswith(f"; remove {reference.path}, it will be recomputed")


def test_a_float32_cache_is_refused_where_the_policy_computes_in_bf16(sharp, long_pairs, tmp_path):
    """It is nearer than another way in bf16 may be, and still every row is off by the same in all steps."""
    reference = Cached().prepare(sharp, long_pairs, tmp_path)
    with in_bf16(), pytest.raises(StepZeroError, match="computed in float32, the policy computes in bfloat16.*remove"):
        check_step_zero(sharp, DPO(0.01), reference, collate(long_pairs))
    with pytest.raises(StepZeroError, match="tolerance of float32"):  # and the other way around
        rounded = Cached().prepare(sharp, long_pairs, tmp_path, in_bf16)
        check_step_zero(sharp, DPO(0.01), rounded, collate(long_pairs))


def test_bf16_weights_are_checked_as_what_they_compute_in(sharp, long_pairs, tmp_path):
    short = copy.deepcopy(sharp).to(torch.bfloat16)
    reference = Cached().prepare(short, long_pairs, tmp_path, tokens=100)
    select_forward(short)
    check_step_zero(short, DPO(1.0), reference, collate(long_pairs))


def test_step_zero_is_forwarded_in_micro_batches(policy, pairs, tmp_path, monkeypatch):
    reference, batch = Cached().prepare(policy.model, pairs, tmp_path), collate(pairs)
    whole, seen = check_step_zero(policy.model, DPO(0.5), reference, batch), []
    monkeypatch.setattr(step_zero, "pair_logps", lambda model, part: seen.append(part) or pair_logps(model, part))
    assert check_step_zero(policy.model, DPO(0.5), reference, batch, 40) == pytest.approx(whole, abs=1e-6)
    assert [key for part in seen for key in part.keys] == batch.keys
    assert max(len(part.tokens) for part in seen) <= 40 < len(batch.tokens)


def test_reference_stays_out_of_state_and_train_mode(policy, pairs, tmp_path):
    reference = Frozen().prepare(policy.model, pairs, tmp_path)
    module = DPOModule(
        copy.deepcopy(policy.model), DPO(), reference, Optim(), total_steps=1, batch_size=1, tokens_per_microbatch=9
    )
    module.train()
    assert len(module.state_dict()) == len(policy.model.state_dict())
    assert len(list(module.parameters())) == len(list(policy.model.parameters()))
    assert not reference.model.training
    assert not any(p.requires_grad for p in reference.model.parameters())
