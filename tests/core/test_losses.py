"""The losses against numbers worked by hand, their invariants, and the textbook function."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_lab
from dpo_lab.core.losses import (
    CDPO,
    DPO,
    DPOKL,
    DPOP,
    LOSSES,
    RDPO,
    RPO,
    Hinge,
    IPOMean,
    IPOSum,
    Loss,
    SFTChosen,
    SimPO,
    Unlikelihood,
)
from dpo_lab.core.pairs import PairLogps
from dpo_lab.health.evidence import loss_traits
from tests.support.losses import OF_PAIRS, make_loss


def logps(chosen, rejected, chosen_length=None, rejected_length=None) -> PairLogps:
    ones = [1] * len(chosen)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    return PairLogps(
        as_tensor(chosen), as_tensor(rejected), as_tensor(chosen_length or ones), as_tensor(rejected_length or ones)
    )


POLICY_A = logps([-0.5, -10, -1], [-0.1, -30, -21])
REFERENCE_A = logps([-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1])
UNIFORM_A = logps([0, 0, 0], [0, 0, 0])
POLICY_B = logps([-3, -2.5, -4, -1.5], [-5, -3.5, -6, -2.5])
REFERENCE_B = logps([-2.8, -2.3, -3.8, -1.4], [-3.2, -2.7, -4.2, -1.8])


@pytest.mark.parametrize(
    ("loss", "reference", "expected"),
    [
        (DPO(0.1), REFERENCE_A, [0.693147, 0.313262, 0.126928]),
        (Hinge(0.1), REFERENCE_A, [1, 0, 0]),
        (CDPO(0.1, 0.1), REFERENCE_A, [0.693147, 0.413262, 0.326928]),
        (RDPO(0.1, 0.1), REFERENCE_A, [0.693147, 0.188262, -0.123072]),
        (IPOSum(0.1), REFERENCE_A, [25, 25, 225]),
        (DPO(0.1), UNIFORM_A, [0.713347, 0.126928, 0.126928]),
        (SFTChosen(0.1), UNIFORM_A, [0.5, 10, 1]),
        (Unlikelihood(0.1, alpha=0.5), UNIFORM_A, [0.45, -5, -9.5]),
        (RPO(0.1, alpha=0.5), REFERENCE_A, [0.943147, 5.313262, 0.626928]),
        (DPOP(0.1, penalty=5), REFERENCE_A, [0.693147, 0.313262, 0.192476]),  # the last: h = 20 - 5 * 0.9
        (DPOKL(0.1, kl_weight=0.1), REFERENCE_A, [0.693147, 2.763762, 11.067428]),  # r of the second: 0.1, -9.9
    ],
)
def test_set_a(loss, reference, expected):
    assert loss(POLICY_A, reference).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(0.1), [0.616344, 0.663597]),
        (DPO(0.5), [0.371101, 0.554355]),
        (DPO(1.0), [0.183901, 0.437488]),
        (CDPO(0.1, 0.1), [0.632344, 0.669597]),
    ],
)
def test_set_b(loss, expected):
    assert loss(POLICY_B, REFERENCE_B)[:2].tolist() == pytest.approx(expected, abs=1e-6)


def test_ipo_mean_and_sum_are_two_losses():
    # h per token: (-6/3 - -9/3) - 0 = 1, (1 - 5)^2 = 16; summed: 3, (3 - 5)^2 = 4
    policy, reference = logps([-6], [-9], [3], [3]), logps([0], [0], [3], [3])
    assert IPOMean(0.1)(policy, reference).item() == pytest.approx(16)
    assert IPOSum(0.1)(policy, reference).item() == pytest.approx(4)


def test_simpo():
    # means -1 and -3: h = 2; -log sigma(2 * 2 - 1) = log(1 + e^-3)
    policy, reference = logps([-2], [-12], [2], [4]), logps([0], [0], [2], [4])
    assert SimPO(2.0, gamma=1.0)(policy, reference).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_rpo_weighs_the_likelihood_of_a_token():
    # ln 2 + 2 * 6 / 3: the length of the rejected response has no say
    policy = logps([-6], [-9], [3], [9])
    assert RPO(0.1, alpha=2.0)(policy, policy).item() == pytest.approx(math.log(2) + 4)


@pytest.mark.parametrize("loss", [DPO(0.3), CDPO(0.3, 0.2), RDPO(0.3, 0.2), DPOP(0.3), DPOKL(0.3)])
def test_policy_equal_to_reference_gives_ln_2(loss):
    assert loss(POLICY_B, POLICY_B).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-12)


def test_smoothing_and_flip_rate_of_zero_are_dpo():
    expected = DPO(0.1)(POLICY_A, REFERENCE_A).tolist()
    assert CDPO(0.1, 0.0)(POLICY_A, REFERENCE_A).tolist() == expected
    assert RDPO(0.1, 0.0)(POLICY_A, REFERENCE_A).tolist() == expected


@pytest.mark.parametrize("loss", [RPO(0.1, alpha=0), DPOP(0.1, penalty=0), DPOKL(0.1, kl_weight=0)])
def test_dpo_with_a_term_of_weight_zero_is_dpo(loss):
    assert loss(POLICY_A, REFERENCE_A).tolist() == DPO(0.1)(POLICY_A, REFERENCE_A).tolist()


def test_unlikelihood_between_fine_tuning_and_the_bare_margin():
    assert Unlikelihood(alpha=0)(POLICY_B, UNIFORM_A).tolist() == SFTChosen()(POLICY_B, UNIFORM_A).tolist()
    assert Unlikelihood(alpha=1)(POLICY_B, UNIFORM_A).tolist() == (-POLICY_B.margin).tolist()


@pytest.mark.parametrize("loss", [SFTChosen, Unlikelihood])
def test_beta_has_no_say_without_a_comparison(loss):
    assert loss(beta=0.1)(POLICY_B, UNIFORM_A).tolist() == loss(beta=7.0)(POLICY_B, UNIFORM_A).tolist()
    assert not loss.is_bradley_terry


def test_the_penalty_is_kl_to_second_order():
    """Over all of 50 responses, weighted by the reference: what is left of KL(ref || pi) is E[r^3] / 6, of the other way twice
    that.
    """
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    direction = torch.randn(50, generator=generator, dtype=torch.float64)
    length = torch.ones(50)
    policy = (reference + 1e-3 * direction).log_softmax(0)
    sides = [PairLogps(logps, logps, length, length) for logps in (policy, reference)]  # of a pair, twice one response
    estimate = (reference.exp() * (DPOKL(0.1, kl_weight=1.0)(*sides) - math.log(2))).sum()
    forward, backward = ((p.exp() * (p - q)).sum() for p, q in [(reference, policy), (policy, reference)])
    assert (estimate / forward).item() == pytest.approx(1, abs=1e-3)
    third = (reference.exp() * (policy - reference) ** 3).sum()
    assert ((forward - estimate) / third).item() == pytest.approx(1 / 6, rel=0.01)
    assert ((backward - estimate) / third).item() == pytest.approx(1 / 3, rel=0.01)


def swapped(of: PairLogps) -> PairLogps:
    return PairLogps(of.rejected, of.chosen, of.rejected_length, of.chosen_length)


def test_swapping_sides_negates_the_margin():
    assert (swapped(POLICY_A) - swapped(REFERENCE_A)).margin.tolist() == (-(POLICY_A - REFERENCE_A).margin).tolist()


def test_cdpo_at_one_half_does_not_see_the_label():
    loss = CDPO(0.1, 0.5)
    assert loss(swapped(POLICY_A), swapped(REFERENCE_A)).tolist() == pytest.approx(loss(POLICY_A, REFERENCE_A).tolist())


def test_rdpo_is_unbiased_under_flips():
    """Its mean over labels flipped at its rate is the DPO loss on the clean labels: the property it is made for."""
    loss, clean = RDPO(0.1, 0.3), DPO(0.1)(POLICY_A, REFERENCE_A)
    mixed = 0.7 * loss(POLICY_A, REFERENCE_A) + 0.3 * loss(swapped(POLICY_A), swapped(REFERENCE_A))
    assert mixed.tolist() == pytest.approx(clean.tolist())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_stay_finite(name, margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    policy = PairLogps(chosen, zero, one, one, unrelated=chosen.detach())
    value = make_loss(name)(policy, PairLogps(zero, zero, one, one, unrelated=zero, score_gap=zero - 1e4))
    value.sum().backward()
    assert value.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradient_against_finite_differences(name):
    loss = make_loss(name, beta=0.2)
    sides = [side.clone().requires_grad_() for side in (POLICY_B.chosen, POLICY_B.rejected)]
    lengths = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    reference = PairLogps(REFERENCE_B.chosen, REFERENCE_B.rejected, lengths, lengths, score_gap=lengths - 4)
    assert torch.autograd.gradcheck(
        lambda *both: loss(PairLogps(*both, lengths, lengths), reference) + 0 * sum(both), sides
    )


@pytest.mark.parametrize(
    ("loss", "moved", "expected"),
    [
        (SFTChosen(), 0.0, [-1, 0]),
        (Unlikelihood(alpha=0.5), 0.0, [-1, 0.5]),
        (RPO(0.2, alpha=0.6), 0.0, [-0.2 / 2 - 0.6 / 3, 0.2 / 2]),  # three tokens
        (DPOP(0.2, penalty=4), 0.0, [-0.2 / 2, 0.2 / 2]),  # no price at the start, nor above it
        (DPOP(0.2, penalty=4), -1.0, [-0.2 * 5 * 0.731059, 0.2 * 0.731059]),  # sigma(-0.2 (-1 - 4))
        (DPOKL(0.2, kl_weight=0.6), 0.0, [-0.2 / 2, 0.2 / 2]),
        (DPOKL(0.2, kl_weight=0.6), -1.0, [-0.2 * 0.549834 - 0.6 / 2, 0.2 * 0.549834]),  # sigma(0.2); r of w is -1
    ],
)
def test_gradients_by_hand(loss, moved, expected):
    """Of a pair whose chosen response, of three tokens, has `moved` nats more than under the reference."""
    reference = logps([-6.0], [-9.0], [3], [3])
    chosen, rejected = (reference.chosen + moved).requires_grad_(), reference.rejected.clone().requires_grad_()
    value = loss(PairLogps(chosen, rejected, reference.chosen_length, reference.rejected_length), reference)
    found = torch.autograd.grad(value.sum() + 0 * rejected.sum(), (chosen, rejected))
    assert [of.item() for of in found] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_beta_out_of_range_is_refused(name, beta):
    with pytest.raises(ValueError, match="beta="):
        make_loss(name, beta=beta)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: CDPO(0.1, 0.6), "loss.label_smoothing"),
        (lambda: RDPO(0.1, 0.5), "loss.flip_rate"),
        (lambda: SimPO(2.0, -1.0), "loss.gamma"),
        (lambda: Unlikelihood(alpha=1.1), "loss.alpha"),
        (lambda: RPO(alpha=-0.1), "loss.alpha"),
        (lambda: DPOP(penalty=math.inf), "loss.penalty"),
        (lambda: DPOKL(kl_weight=math.nan), "loss.kl_weight"),
    ],
)
def test_own_settings_out_of_range_are_refused(make, key):
    with pytest.raises(ValueError, match=key):
        make()


def test_every_loss_is_in_the_table_once():
    def leaves(cls) -> set[type]:
        return {leaf for c in cls.__subclasses__() for leaf in (leaves(c) or {c})}

    assert set(LOSSES.values()) == leaves(Loss)
    assert len(set(LOSSES.values())) == len(LOSSES)


EARLIER = "dpo cdpo rdpo ipo ipo_mean hinge simpo sft unlikelihood rpo dpop dpo_kl".split()  # than traits in records


@pytest.mark.parametrize("name", EARLIER)
def test_a_record_without_traits_has_those_that_its_loss_states(name):
    stated, config = make_loss(name, beta=0.2).traits(), {"loss": {"kind": name, "beta": 0.2}}
    assert loss_traits({"config": config, "loss_traits": stated}) == stated
    derived = loss_traits({"config": config})
    assert derived is not None
    assert derived == pytest.approx({trait: stated[trait] for trait in derived})


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_loss_of_the_margin_alone_ignores_the_rest(name):
    """Both log-probabilities of the policy shift by one number, and where margins are not per token the chosen responses are
    longer: the margin stays, and so does a loss of it alone.
    """
    loss = make_loss(name, beta=0.2)
    lengths = dict(chosen_length=[3] * 4, rejected_length=[3] * 4)
    others = lengths if loss.is_per_token else lengths | {"chosen_length": [5] * 4}
    reference = logps([-2.8, -2.3, -3.8, -1.4], [-3.2, -2.7, -4.2, -1.8], **lengths)
    reference.score_gap = torch.tensor([1.0, 0.5, 2.0, 1.0])
    policy = logps([-3, -2.5, -4, -1.5], [-5, -3.5, -6, -2.5], **lengths)
    shifted = logps([-4, -3.5, -5, -2.5], [-6, -4.5, -7, -3.5], **others)
    is_equal = loss(policy, reference).tolist() == pytest.approx(loss(shifted, reference).tolist())
    assert is_equal == (loss.is_margin_only or loss.needs_scores)  # a fixed offset of the margin is no function of it


def test_a_loss_that_does_not_state_its_traits_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'is_bradley_terry'"):

        class Silent(Loss, name="silent", requires_reference=None, is_per_token=False, is_margin_only=True):
            """Does not say whether it rates pairs."""

    assert "silent" not in LOSSES


def test_two_losses_of_one_name_are_refused():
    traits = dict(requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True)
    with pytest.raises(TypeError, match="Another: the name 'dpo' is taken by DPO; choose another"):

        class Another(Loss, name="dpo", **traits):
            """Takes a name that is taken."""

    assert LOSSES["dpo"] is DPO


def test_every_loss_is_there_for_a_notebook():
    assert {loss.__name__: loss for loss in LOSSES.values()}.items() <= vars(dpo_lab.losses).items()
    assert dpo_lab.losses.PairLogps is PairLogps


def test_textbook_function():
    columns = (POLICY_B.chosen, POLICY_B.rejected, REFERENCE_B.chosen, REFERENCE_B.rejected)
    loss, metrics = dpo_lab.dpo_loss(*columns, beta=0.1)
    assert loss.item() == pytest.approx((0.616344 + 0.663597) / 2, abs=1e-6)  # h = 1.6 and .6, twice each
    assert metrics == pytest.approx(
        {
            "loss": loss.item(),
            "chosen_rewards": -0.175,
            "rejected_rewards": -1.275,
            "reward_margin": 0.11,
            "accuracy": 1.0,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_textbook_function_counts_ties_half_and_trains():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = dpo_lab.dpo_loss(
        policy, torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -3.0])
    )
    # margins 0 (a tie) and -1 (wrong): accuracy 1/4
    assert metrics["accuracy"] == 0.25
    loss.backward()
    assert policy.grad is not None
    assert policy.grad[0].item() == pytest.approx(-0.1 * 0.5 / 2)  # -beta sigma(0) / B
