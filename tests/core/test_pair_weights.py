"""Weights of pairs (WPO): by hand, and against every response's distributions in float64, on every path; no gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_lab.core import fused_lm_head
from dpo_lab.core.losses import BCO, DPO, DPOMean, PairLogps
from dpo_lab.core.losses.base import Weighting
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps, pair_loss
from tests.conftest import make_pairs
from tests.core.test_token_weights import model, with_gaps

__all__ = ["model"]  # the fixture: a model on each path


def log_weight(model, prompt, response, scored) -> Tensor:
    """The mean over scored tokens of log pi(token) - log sum_v pi(v)^2."""
    logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    terms = [
        logps[len(prompt) + t - 1, token] - (2 * logps[len(prompt) + t - 1]).logsumexp(-1)
        for t, token in enumerate(response)
        if scored[t]
    ]
    return torch.stack(terms).mean()


def weights_of(model, pairs: list[EncodedPair]) -> Tensor:
    found = []
    for pair in pairs:
        masks = pair.scored or ([True] * len(pair.chosen), [True] * len(pair.rejected))
        sides = zip((pair.chosen, pair.rejected), masks, strict=True)
        found.append(sum(log_weight(model, pair.prompt, ids, mask) for ids, mask in sides).exp())
    return torch.stack(found).detach()


def test_by_hand():
    """Chosen: tokens of 1/2 and 1/4, where sum_v pi(v)^2 is 1/2 and 1/4, so w = 1. Rejected: one of 1/8 at 1/2, w = 1/4."""
    sums = torch.tensor([[math.log(1 / 8), math.log(1 / 8), 0.0, math.log(1 / 4)]])
    policy = PairLogps.of(sums, torch.tensor([[2, 1]]))
    assert policy.weight.item() == pytest.approx(1 / 4)
    assert policy.weigh(DPO(1.0)(policy, policy)).item() == pytest.approx(math.log(2) / 4)
    assert PairLogps.of(sums[:, :2], torch.tensor([[2, 1]])).weight is None


@pytest.mark.parametrize("loss", [DPO(0.4), DPOMean(2.0)])
def test_weights_and_gradients_are_those_of_one_response_at_a_time(loss, model, monkeypatch):
    monkeypatch.setattr(fused_lm_head, "ROWS", 8)
    pairs = with_gaps(make_pairs(9))
    batch, exact = collate(pairs), weights_of(model, pairs)
    torch.testing.assert_close(pair_logps(model, batch, True).weight, exact, rtol=1e-9, atol=0)
    reference = PairLogps(*(-torch.rand(2, 9, dtype=torch.float64)), *batch.response_lengths.unbind(1))
    expected = (loss(pair_logps(model, batch), reference) * exact).sum()
    total, policy = pair_loss(model, batch, loss, reference, weighs_pairs=True)
    torch.testing.assert_close(policy.weight, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)
    parameters = list(model.parameters())
    ours, theirs = torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_uniform_policy_weighs_every_pair_1(model):
    """Each token has probability 1/V, and so has sum_v pi(v)^2."""
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    weight = pair_logps(model, collate(make_pairs(4)), True).weight
    torch.testing.assert_close(weight, torch.ones(4, dtype=weight.dtype), rtol=1e-9, atol=0)


def test_it_is_refused_where_there_is_no_single_pair_or_tokens_weigh_otherwise():
    for loss, why in ((BCO(), "of a whole step"), (DPO(ld_alpha=0.5), "loss.ld_alpha weighs tokens")):
        with pytest.raises(ValueError, match=f"loss.weighting=wpo: .*{why}; type loss.weighting=none"):
            replace(loss, weighting=Weighting.wpo)
