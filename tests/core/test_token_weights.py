"""Weights of tokens: by hand, and against sums one response at a time in float64, on every path and through gradients."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dpo_lab.core import fused_lm_head
from dpo_lab.core.fused_lm_head import fused_loss
from dpo_lab.core.lm_head import LMHead
from dpo_lab.core.losses import DPO, LOSSES, RPO, PairLogps
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps, pair_loss, response_nll, select_forward
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.models.reference import Cached, UniformLogps
from tests.conftest import make_pairs


def mask(text: str) -> np.ndarray:
    return np.array([letter == "+" for letter in text])


def with_gaps(pairs: list[EncodedPair], tail_weight: float = 1.0) -> list[EncodedPair]:
    """About a third of the response tokens of three pairs in four is not scored, their first tokens are."""
    rng = np.random.default_rng(0)
    made = []
    for i, pair in enumerate(pairs):
        scored = tuple(rng.random(len(side)) < 0.7 for side in (pair.chosen, pair.rejected))
        for side in scored:
            side[0] = True
        made.append(replace(pair, scored=scored if i % 4 else None, tail_weight=tail_weight))
    return made


def test_the_longer_response_by_hand():
    pair = EncodedPair("k", [1], [2, 3], [4, 5, 6, 7], tail_weight=0.25)
    assert pair.token_weights.tolist() == [1, 1, 1, 1, 0.25, 0.25]
    assert pair.flip().token_weights.tolist() == [1, 1, 0.25, 0.25, 1, 1]
    batch = collate([pair])
    assert batch.scored_lengths.tolist() == batch.response_lengths.tolist() == [[2, 4]]
    # a uniform model over 8 tokens: 2 ln 8 for chosen, (2 + 2 / 4) ln 8 for rejected
    logps = UniformLogps(float(np.log(8)))(batch)
    assert [logps.chosen.item(), logps.rejected.item()] == pytest.approx([-4.158883, -5.198604])
    assert DPO(1.0)(logps, replace(logps, chosen=logps.rejected)).item() == pytest.approx(
        0.302733, abs=1e-6
    )  # ln(1 + 8 ** -0.5)


def test_only_scored_tokens_count_towards_the_shorter_length():
    pair = EncodedPair("k", [1], [2, 3, 4, 5], [6, 7, 8], scored=(mask("+--+"), mask("+++")), tail_weight=0.5)
    assert pair.scored_lengths == (2, 3)
    assert pair.token_weights.tolist() == [1, 0, 0, 1, 1, 1, 0.5]
    assert pair.flip().scored_lengths == (3, 2)
    assert pair.flip().flip().token_weights.tolist() == pair.token_weights.tolist()
    lengths = collate([pair, EncodedPair("l", [1], [2], [3, 4])])
    assert lengths.scored_lengths.tolist() == [[2, 3], [1, 2]]
    assert lengths.weights.tolist() == [1, 0, 0, 1, 1, 1, 0.5, 1, 1, 1]


def test_weights_of_1_are_not_stored():
    assert collate([replace(pair, tail_weight=1.0) for pair in make_pairs(4)]).weights is None


def test_a_table_keeps_what_is_scored():
    pairs = [pair.flip() if i % 3 == 0 else pair for i, pair in enumerate(with_gaps(make_pairs(10), 0.5))]
    table = PairTable.of(pairs)
    plain = replace(PairTable.of(make_pairs(3, seed=5)), tail_weight=0.5)
    cases = [
        (table, pairs),
        (table[2:9:2], pairs[2:9:2]),
        (table[:4].concat(table[4:]), pairs),
        (table.concat(plain), [*pairs, *plain]),
        (plain.concat(table), [*plain, *pairs]),
        (table.flip(np.ones(10, bool)), [pair.flip() for pair in pairs]),
    ]
    for found, expected in cases:
        assert [pair.token_weights.tolist() for pair in found] == [pair.token_weights.tolist() for pair in expected]
    assert table.digest() != replace(table, scored=None).digest()
    assert table.chosen_only()[0].scored_lengths == (int(table.flip(table.flipped)[0].scored_lengths[0]), 0)


def test_a_mapped_file_of_what_is_scored_travels_by_name(tmp_path):
    table = PairTable.of(with_gaps(make_pairs(6)))
    table.scored.tofile(tmp_path / "scored.bin")
    mapped = replace(table, scored=np.memmap(tmp_path / "scored.bin", np.bool_, "r"))
    assert len(pickle.dumps(mapped)) < len(pickle.dumps(table)) + 200
    copy = pickle.loads(pickle.dumps(mapped))
    assert isinstance(copy.scored, np.memmap)
    assert [pair.token_weights.tolist() for pair in copy] == [pair.token_weights.tolist() for pair in table]


def test_micro_batches_split_weights_as_they_split_tokens():
    pairs = with_gaps(make_pairs(12), 0.3)
    parts = collate(pairs).split(30)
    assert len(parts) > 3
    assert torch.cat([part.weights for part in parts]).tolist() == collate(pairs).weights.tolist()
    assert [part.weights.tolist() for part in parts] == [
        collate(pairs[start : start + len(part)]).weights.tolist()
        for part, start in zip(parts, np.cumsum([0, *map(len, parts)]), strict=False)
    ]


@pytest.fixture(params=["shared prompts", "padded rows"])
def model(request, policy: Policy):
    made = TinyPolicy(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=256)
    model = made.build(policy.tokenizer, seed=0).double()
    if request.param == "shared prompts":
        select_forward(model)
    return model


def one_by_one(model, pairs: list[EncodedPair]) -> list[list[torch.Tensor]]:
    """The weighted sum of each response's token log-probabilities, by a forward pass of its own."""
    sums = []
    for pair in pairs:
        weights = np.split(pair.token_weights, [len(pair.chosen)])
        of_pair = []
        for side, weight in zip((pair.chosen, pair.rejected), weights, strict=True):
            row = torch.tensor([[*pair.prompt, *side]])
            logps = model(input_ids=row).logits[0].log_softmax(-1)
            start = len(pair.prompt)
            of_pair.append(sum(logps[start + t - 1, row[0, start + t]] * float(w) for t, w in enumerate(weight)))
        sums.append(of_pair)
    return sums


def test_sums_and_gradients_are_those_of_one_response_at_a_time(model, monkeypatch):
    monkeypatch.setattr(fused_lm_head, "ROWS", 8)
    pairs = with_gaps(make_pairs(9), 0.3)
    batch, loss = collate(pairs), RPO(0.4)
    expected = one_by_one(model, pairs)
    found = pair_logps(model, batch)
    for side, at in ((found.chosen, 0), (found.rejected, 1)):
        torch.testing.assert_close(side, torch.stack([row[at] for row in expected]), rtol=0, atol=1e-10)
    assert found.chosen_length.tolist() == [pair.scored_lengths[0] for pair in pairs]
    reference = PairLogps(*(-torch.rand(2, 9, dtype=torch.float64)), *batch.response_lengths.unbind(1))
    policy = PairLogps(*(torch.stack(side) for side in zip(*expected, strict=True)), *batch.response_lengths.unbind(1))
    exact = loss(policy, reference).sum()
    total, _ = pair_loss(model, batch, loss, reference)
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    for ours, other in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)  # the attention of packed streams in float64


def test_supervised_fine_tuning_takes_scored_tokens_alone(model):
    pairs = [replace(p, rejected=[], scored=(p.scored[0], mask(""))) for p in with_gaps(make_pairs(6)) if p.scored]
    batch = collate(pairs)
    nll = response_nll(model, batch.tokens, batch.lengths[:, :2], batch.weights)
    torch.testing.assert_close(nll, -sum(row[0] for row in one_by_one(model, pairs)), rtol=0, atol=1e-10)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    lengths = np.array([[3, 5, 2], [1, 4, 6]])
    weights = torch.tensor([1, 0, 1, 0.25, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0.25, 0.25])
    head, targets = LMHead(nn.Linear(4, 7, bias=False).double(), 7), torch.randint(7, (17,))

    def total(hidden: torch.Tensor) -> torch.Tensor:
        return fused_loss(hidden, head, targets, lengths, lambda sums, _: (sums[:, 0] - sums[:, 1]).tanh(), weights)[0]

    hidden, step = torch.randn(17, 4, dtype=torch.float64), 1e-5
    (found,) = torch.autograd.grad(total(hidden.requires_grad_()), hidden)
    for place in np.ndindex(17, 4):
        moved = torch.zeros(17, 4, dtype=torch.float64)
        moved[place] = step
        slope = (total(hidden.detach() + moved) - total(hidden.detach() - moved)) / (2 * step)
        assert found[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_at_1_it_is_the_plain_sum_and_at_0_that_of_the_shared_length(alpha, policy):
    pairs = [pair for pair in make_pairs(12) if len(pair.chosen) != len(pair.rejected)]
    shorter = [min(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    cut = [replace(p, chosen=p.chosen[:n], rejected=p.rejected[:n]) for p, n in zip(pairs, shorter, strict=True)]
    found = pair_logps(policy.model, collate([replace(pair, tail_weight=alpha) for pair in pairs]))
    expected = pair_logps(policy.model, collate(pairs if alpha else cut))
    limit = 0 if alpha else 1e-5
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=limit)
    torch.testing.assert_close(found.rejected, expected.rejected, rtol=0, atol=limit)


def test_the_reference_cache_holds_weighted_sums_under_their_own_key(policy, tmp_path):
    plain, gaps = make_pairs(8), with_gaps(make_pairs(8))
    kinds = [plain, gaps, with_gaps(plain, 0.5), with_gaps(plain, 0.25), [replace(p, tail_weight=0.5) for p in plain]]
    caches = [Cached().prepare(policy.model, PairTable.of(pairs), tmp_path) for pairs in kinds]
    assert len({cache.path for cache in caches}) == len(kinds)
    for pairs, cache in zip(kinds, caches, strict=True):
        flipped = [pair.flip() if i % 2 else pair for i, pair in enumerate(pairs)]
        found, expected = cache(collate(flipped)), pair_logps(policy.model, collate(flipped))
        torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.rejected, expected.rejected, rtol=0, atol=1e-4)
        assert found.chosen_length.tolist() == [pair.scored_lengths[0] for pair in flipped]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_sums_takes_ld_alpha(name):
    terms = {"terms": {"dpo": 1.0}} if name == "mix" else {}
    if LOSSES[name].is_per_token:
        with pytest.raises(ValueError, match=r"by a mean over tokens already; type loss.ld_alpha=1"):
            LOSSES[name](ld_alpha=0.5, **terms)
    else:
        assert LOSSES[name](ld_alpha=0.5, **terms).ld_alpha == 0.5


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_ld_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match=r"loss.ld_alpha=.*must lie in \[0, 1\]"):
        DPO(ld_alpha=alpha)
