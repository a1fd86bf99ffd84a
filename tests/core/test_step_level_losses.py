"""Losses over whole steps against numbers worked by hand, and their linear form against their gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpo_lab.core.linear_loss import LinearLoss
from dpo_lab.core.losses import AOT, BCO, DPO, KTO, LOSSES, AOTUnpaired, BetaDPO
from dpo_lab.core.losses.base import StepLevel
from dpo_lab.core.pairs import PairLogps
from tests.support.losses import STEP_LEVEL, make_loss


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    values = (chosen, rejected, [1] * len(chosen), [1] * len(chosen))
    return PairLogps(*(torch.tensor(each, dtype=torch.float64) for each in values))


def three(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# margins 3, -1, 1 and under the reference 0, 2, -1; r(w) 1, -1, 0 and r(l) -2, 2, -2
POLICY = replace(logps([-1, -4, -3], [-4, -3, -4]), unrelated=three(-2, -3, -4))
REFERENCE = replace(
    logps([-2, -3, -3], [-2, -5, -2]), unrelated=three(-3, -5, -2.5)
)  # ratios 1 2 -1.5, whose mean is .5


def softplus(*values: float) -> list[float]:
    """-log sigma(-x) = log(1 + exp x)."""
    return [math.log1p(math.exp(value)) for value in values]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # sorted -1 1 3 against -1 0 2: differences 0 1 1, of the second, third and first pair
        (AOT(0.5), softplus(-0.5, 0, -0.5)),
        # sorted -1 0 1 against -2 -2 2: differences 1 2 -1, of the second, third and first pair
        (AOTUnpaired(0.5), softplus(0.5, -0.5, -1)),
        # rewards .5 -.5 0 and -1 1 -1: their mean is -1/6
        (BCO(0.5), [sum(softplus(-r - 1 / 6, s + 1 / 6)) for r, s in ((0.5, -1), (-0.5, 1), (0, -1))]),
        (BCO(0.5, shift=False), [sum(softplus(-r, s)) for r, s in ((0.5, -1), (-0.5, 1), (0, -1))]),
        # sigma(-beta (r - .5)) of r(w), sigma(beta (r - .5)) of r(l)
        (
            KTO(0.5, 1, 2),
            [sigma(-0.25) + 2 * sigma(-1.25), sigma(0.75) + 2 * sigma(0.75), sigma(0.25) + 2 * sigma(-1.25)],
        ),
        # h 3 -3 2, whose mean is the running mean
        (BetaDPO(0.5, alpha=0.6), softplus(-1.5, 1.5, -1)),
    ],
)
def test_by_hand(loss, expected):
    assert loss(POLICY, REFERENCE).tolist() == pytest.approx(expected)


def test_the_baseline_of_kto_is_never_negative_and_its_gradient_none():
    below = replace(POLICY, unrelated=POLICY.unrelated - 1)  # their mean is -.5
    assert KTO(0.5)(below, REFERENCE)[0].item() == pytest.approx(sigma(-0.5) + sigma(-1))
    unrelated = three(-2, -3, -4).requires_grad_()
    chosen = POLICY.chosen.clone().requires_grad_()
    KTO(0.5)(replace(POLICY, chosen=chosen, unrelated=unrelated), REFERENCE).sum().backward()
    assert unrelated.grad is None
    assert chosen.grad is not None
    assert chosen.grad[0].item() == pytest.approx(-0.5 * sigma(0.25) * sigma(-0.25))


def test_kto_takes_responses_labelled_on_their_own():
    alone = replace(POLICY, chosen_length=three(1, 0, 1), rejected_length=three(0, 1, 1))
    zeros = replace(alone, chosen=POLICY.chosen * three(1, 0, 1), rejected=POLICY.rejected * three(0, 1, 1))
    reference = replace(
        REFERENCE, chosen=REFERENCE.chosen * three(1, 0, 1), rejected=REFERENCE.rejected * three(0, 1, 1)
    )
    expected = [sigma(-0.25), sigma(0.75), sigma(0.25) + sigma(-1.25)]
    assert KTO(0.5)(zeros, replace(reference, chosen_length=alone.chosen_length)).tolist() == pytest.approx(expected)
    assert KTO.takes_unpaired


def test_bco_takes_responses_labelled_on_their_own():
    """Rewards .5, 1 and, of a pair, 0 and -1: their mean is 1/8; a side that there is not has no term."""
    policy, reference = logps([-1, 0, -3], [0, -3, -4]), logps([-2, 0, -3], [0, -5, -2])
    for each in (policy, reference):
        each.chosen_length, each.rejected_length = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    expected = [softplus(-0.5 + 1 / 8), softplus(1 - 1 / 8), softplus(0 + 1 / 8, -1 - 1 / 8)]
    assert BCO(0.5)(policy, reference).tolist() == pytest.approx([sum(terms) for terms in expected])
    assert BCO(0.5).statistic(policy, reference).item() == pytest.approx(1 / 8)
    assert {name for name, loss in LOSSES.items() if loss.takes_unpaired} >= {"bco"}
    assert not DPO.takes_unpaired


def test_beta_follows_the_margins_of_the_step():
    """beta h is 1.5 -1.5 1, its mean 1/3; the running mean is 0, so beta is .5 (1 + .6 / 3)."""
    found = BetaDPO(0.5, alpha=0.6)(POLICY, REFERENCE, torch.tensor(0.0))
    assert found.tolist() == pytest.approx(softplus(-0.6 * 3, 0.6 * 3, -0.6 * 2))
    below = BetaDPO(0.5, alpha=0.6)(POLICY, REFERENCE, torch.tensor(9.0))  # would be negative
    assert below.tolist() == pytest.approx(softplus(-0.0005 * 3, 0.0005 * 3, -0.0005 * 2))


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_the_order_of_pairs_does_not_matter(name):
    loss, order = make_loss(name, beta=0.5), [2, 0, 1]
    mixed = [of[torch.tensor(order)] for of in (POLICY, REFERENCE)]
    assert loss(*mixed).tolist() == pytest.approx(loss(POLICY, REFERENCE)[order].tolist())


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_a_step_of_a_policy_that_equals_its_reference(name):
    expected = {"bco": 2, "mix": 0.7 + 0.3 * 2, "kto": 1 / math.log(2)}.get(name, 1) * math.log(2)
    assert make_loss(name)(REFERENCE, REFERENCE).tolist() == pytest.approx([expected] * 3)


def test_aot_unpaired_does_not_see_which_responses_belong_together():
    turned = PairLogps(POLICY.chosen, POLICY.rejected.roll(1), *[POLICY.chosen_length] * 2)
    turned_reference = PairLogps(REFERENCE.chosen, REFERENCE.rejected.roll(1), *[POLICY.chosen_length] * 2)
    loss = AOTUnpaired(0.5)
    assert loss(turned, turned_reference).sum().item() == pytest.approx(loss(POLICY, REFERENCE).sum().item())


@pytest.mark.parametrize("name", ["dpo", *STEP_LEVEL])
def test_the_linear_form_has_the_value_and_the_gradient_of_the_loss(name):
    loss = make_loss(name, beta=0.5)
    linear = LinearLoss.of(lambda policy: loss(policy, REFERENCE), POLICY)
    sides = [POLICY.chosen.clone().requires_grad_(), POLICY.rejected.clone().requires_grad_()]
    policy = replace(POLICY, chosen=sides[0], rejected=sides[1])
    assert linear(policy).tolist() == loss(POLICY, REFERENCE).tolist()
    exact = torch.autograd.grad(loss(policy, REFERENCE).sum(), sides)
    part = policy[1:]
    found = torch.autograd.grad(linear[:1](policy[:1]).sum() + linear[1:](part).sum(), sides)
    for one, other in zip(found, exact, strict=True):
        assert one.tolist() == pytest.approx(other.tolist())


@pytest.mark.parametrize("name", STEP_LEVEL)
def test_gradient_against_finite_differences(name):
    """Where the running mean is given, through which no gradient flows."""
    loss, running = make_loss(name, beta=0.5), torch.full((2,), 0.1, dtype=torch.float64)
    if name == "beta_dpo":
        loss.alpha = 0.0  # no gradient flows through its beta either
    sides = [torch.tensor(of, dtype=torch.float64, requires_grad=True) for of in ([-1, -4, -3.5], [-4.5, -3, -4])]
    of_loss = running if name == "mix" else running[0]

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(replace(POLICY, chosen=chosen, rejected=rejected), REFERENCE, of_loss)

    assert torch.autograd.gradcheck(value, sides)


def test_momentum_out_of_range_is_refused():
    for make in (BCO, BetaDPO):
        with pytest.raises(ValueError, match=r"loss.momentum=1: must lie in \[0, 1\)"):
            make(momentum=1)
    assert not isinstance(DPO(), StepLevel)
