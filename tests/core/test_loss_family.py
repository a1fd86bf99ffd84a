"""Losses of the family beside DPO's own, each against a number worked by hand, and their own properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpo_lab.core.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    KTO,
    LOSSES,
    NCA,
    ODPO,
    ORPO,
    SPPO,
    APODown,
    APOZero,
    BetaDPO,
    CalDPO,
    DiscoPOP,
    DPOLength,
    DPOMean,
    Hinge,
    Loss,
    Mix,
    SLiC,
)
from dpo_lab.core.losses.base import Divergence, Weighting
from dpo_lab.core.metrics import LABELLED, pair_values
from dpo_lab.core.pairs import PairLogps
from tests.support.losses import make_loss


def logps(chosen: float, rejected: float) -> PairLogps:
    """Of a pair whose chosen response has four tokens, its rejected one two."""
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, 4, 2)))


# r(w) = 2, r(l) = -1, h = 3; means over tokens: of the log-ratios .5 and -.5, of the policy -1 and -3
POLICY, REFERENCE, UNIFORM = logps(-4, -6), logps(-6, -5), logps(0, 0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (NCA(0.5), 0.313262 + (1.313262 + 0.474077) / 2),  # -log sigma(1), of -1 and of .5
        (SPPO(0.5), (2 - 1) ** 2 + (-1 + 1) ** 2),
        (SPPO(0.25), (2 - 2) ** 2 + (-1 + 2) ** 2),
        (APOZero(0.5), 0.268941 + 0.377541),  # sigma(-1), sigma(-.5)
        (APODown(0.5), 0.731059 + 0.182426),  # sigma(1), sigma(-1.5)
        (CalDPO(0.5), 0.048587 + 1),  # -log sigma(3)
        (EXO(0.5, 0.1), 0.817574 * (-0.201413 + 0.105361) + 0.182426 * (-1.701413 + 2.302585)),  # q = sigma(1.5)
        (DiscoPOP(0.5, 0.5), 0.047426 * 0.201413 + 0.952574 * 0.223130),  # m = sigma(3), exp(-1.5)
        (DPOMean(0.5), 0.474077),  # -log sigma(.5)
        (DPOLength(0.5, 0.25), 0.126928),  # -log sigma(1.5 + .25 * 2)
        (CPO(0.5, 0.5), 0.313262 + 2),  # -log sigma(.5 * 2), four nats
        (ORPO(0.5), 1 + 0.5 * 0.086206),  # log odds -1 + .458675 and -3 + .051069
        (SLiC(0.5, 0.25), 1),  # a margin of 2 that is met
        (SLiC(0.25, 0.25), 2 + 1),
    ],
)
def test_by_hand(loss: Loss, expected):
    reference = UNIFORM if loss.requires_reference is False else REFERENCE
    assert loss(POLICY, reference).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (NCA(0.3), 2 * math.log(2)),
        (SPPO(0.5), 2),
        (APOZero(0.3), 1),
        (APODown(0.3), 1),
        (CalDPO(0.5), math.log(2) + 2),
        (DiscoPOP(0.3), (math.log(2) + 1) / 2),
        (DPOMean(0.3), math.log(2)),
        (EXO(0.3, 0.5), 0),  # the policy has no preference, as the labels
    ],
)
def test_where_policy_and_reference_are_equal(loss, expected):
    assert loss(REFERENCE, REFERENCE).item() == pytest.approx(expected)


def minimum(loss: Loss) -> tuple[float, float]:
    """r(w) and r(l) at the minimum of a loss, by Newton's steps of L-BFGS."""
    ratios = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([ratios], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(PairLogps(ratios[:1], ratios[1:], one, one), PairLogps(zero, zero, one, one)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return tuple(ratios.tolist())


def test_where_the_losses_that_bound_the_chosen_response_have_their_minimum():
    assert minimum(NCA(0.5))[0] == pytest.approx(math.log(2) / 0.5, abs=1e-5)
    assert minimum(SPPO(0.25)) == pytest.approx((2, -2), abs=1e-5)
    chosen, rejected = minimum(CalDPO(0.25))
    assert chosen == pytest.approx(-rejected, abs=1e-6)
    assert chosen == pytest.approx(2 + (1 - 1 / (1 + math.exp(-2 * chosen))) / 2, abs=1e-5)  # the gradient is 0


def test_exo_has_its_minimum_where_the_policy_rates_as_the_labels():
    chosen, rejected = minimum(EXO(0.5, 0.1))
    assert 0.5 * (chosen - rejected) == pytest.approx(math.log(0.9 / 0.1), abs=1e-4)


def test_a_mixture_is_the_weighted_sum_of_its_terms():
    """Those without a reference take none, and settings are a term's own."""
    mix = Mix(0.5, terms={"dpo": 0.8, "bco": 0.2, "cpo": 0.1}, settings={"cpo": {"alpha": 2}, "bco": {"shift": False}})
    parts = (DPO(0.5), 0.8, REFERENCE), (BCO(0.5, shift=False), 0.2, REFERENCE), (CPO(0.5, 2), 0.1, UNIFORM)
    expected = sum(weight * loss(POLICY, reference).item() for loss, weight, reference in parts)
    assert mix(POLICY, REFERENCE).item() == pytest.approx(expected)
    assert mix.requires_reference is True  # bco's


def test_a_mixture_has_what_its_terms_have():
    assert Mix(terms={"dpo": 1, "sft": 0.1}).requires_reference is None
    assert Mix(terms={"simpo": 1, "sft": 0.1}).requires_reference is False
    assert not Mix(terms={"dpo": 1, "sft": 0.1}).is_step_level
    assert Mix(terms={"dpo": 1, "aot": 0.1}).is_step_level
    mix = Mix(0.5, divergence=Divergence.js, terms={"hinge": 1, "sft": 0})
    assert mix(POLICY, REFERENCE).item() == pytest.approx(
        Hinge(0.5, divergence=Divergence.js)(POLICY, REFERENCE).item()
    )


def test_a_mixture_without_terms_of_whole_steps_weighs_pairs():
    assert Mix(terms={"dpo": 1, "sft": 0.1}, weighting=Weighting.wpo).weighs_pairs


def test_the_running_means_of_a_mixture_are_its_terms_own():
    mix = Mix(0.5, terms={"dpo": 1, "bco": 1, "beta_dpo": 1}, settings={"bco": {"momentum": 0.5}})
    first, second = mix.statistic(POLICY, REFERENCE), mix.statistic(REFERENCE, REFERENCE)
    assert first is not None
    assert second is not None
    assert first.tolist() == pytest.approx([0, 0.5 * (2 - 1) / 2, 0.5 * 3])
    running = mix.update(first, second)
    assert running.tolist() == pytest.approx([0, 0.5 * 0.25, 0.9 * 1.5])
    parts = [DPO(0.5)(POLICY, REFERENCE), BCO(0.5)(POLICY, REFERENCE, running[1])]
    parts.append(BetaDPO(0.5)(POLICY, REFERENCE, running[2]))
    assert mix(POLICY, REFERENCE, running).item() == pytest.approx(sum(part.item() for part in parts))


def test_odpo_offsets_the_margin_by_the_difference_in_scores():
    """beta h is 1.5; where label noise swapped the pair the offset is negative, and without scores there is none to take."""
    for gap, expected in ((2.0, 0.974077), (-2.0, 0.029750), (0.0, 0.201413)):  # log(1 + e^-.5), of -3.5 and of -1.5
        reference = replace(REFERENCE, score_gap=torch.tensor([gap]))
        assert ODPO(0.5)(POLICY, reference).item() == pytest.approx(expected, abs=2e-6)
        assert ODPO(0.5, alpha=0)(POLICY, reference).item() == pytest.approx(DPO(0.5)(POLICY, REFERENCE).item())
    with pytest.raises(ValueError, match="has no score_gap"):
        ODPO(0.5)(POLICY, REFERENCE)


def test_a_mixture_asks_for_what_its_terms_ask_for():
    mix = Mix(0.5, terms={"kto": 0.5, "odpo": 2})
    assert (mix.needs_unrelated, mix.needs_scores) == (True, True)
    plain = Mix(terms={"dpo": 1, "bco": 1})
    assert (plain.needs_unrelated, plain.needs_scores) == (False, False)
    one = torch.ones(1, dtype=torch.float64)
    policy, reference = replace(POLICY, unrelated=3 * one), replace(REFERENCE, unrelated=one, score_gap=one)
    expected = 0.5 * KTO(0.5)(policy, reference) + 2 * ODPO(0.5)(policy, reference)
    assert mix(policy, reference).item() == pytest.approx(expected.item())


def test_slic_is_hinge_times_its_margin():
    assert (SLiC(0.25, 0)(POLICY, UNIFORM) * 0.25).item() == Hinge(0.25)(POLICY, UNIFORM).item()


def test_a_response_of_probability_one_has_finite_odds():
    sure = PairLogps(*(torch.tensor([value], requires_grad=value == 0) for value in (0.0, -2.0, 1.0, 1.0)))
    loss = ORPO()(sure, UNIFORM)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert sure.chosen.grad is not None
    assert sure.chosen.grad.isfinite().all()


# f'(t) of ratios t = e^2 and e^-1
DERIVATIVES = {
    "reverse_kl": (2, -1),
    "forward_kl": (1 - 0.135335, 1 - 2.718282),
    "js": (math.log(2 * 7.389056 / 8.389056), math.log(2 * 0.367879 / 1.367879)),
    "alpha": ((1 - 7.389056**-0.5) / 0.5, (1 - 0.367879**-0.5) / 0.5),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_divergences_by_hand(name):
    loss = DPO(0.3, divergence=Divergence(name))
    chosen, rejected = DERIVATIVES[name]
    assert loss(POLICY, REFERENCE).item() == pytest.approx(math.log1p(math.exp(-0.3 * (chosen - rejected))), rel=1e-5)
    rewards = pair_values(loss, loss(POLICY, REFERENCE), POLICY, REFERENCE)[0].tolist()
    shown = dict(zip(LABELLED, rewards, strict=True))
    assert shown["rewards/chosen"] == pytest.approx(0.3 * chosen, rel=1e-5)
    assert shown["logratio/chosen"] == 2
    assert loss(REFERENCE, REFERENCE).item() == pytest.approx(math.log(2))
    assert DPOMean(0.3, divergence=Divergence(name)).scores(POLICY, REFERENCE).rejected.item() == pytest.approx(
        rejected / 2, rel=1e-5
    )


def test_alpha_lies_between_the_two_kl_divergences():
    def scores(divergence: str, alpha: float = 0.5) -> float:
        return DPO(divergence=Divergence(divergence), divergence_alpha=alpha).scores(POLICY, REFERENCE).chosen.item()

    assert scores("alpha", 1) == scores("forward_kl")
    assert scores("alpha", 1e-6) == pytest.approx(scores("reverse_kl"), abs=1e-5)


@pytest.mark.parametrize("divergence", list(Divergence))
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.requires_reference is not False])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_divergences_stay_finite(name, divergence, margin):
    chosen, zero, one = torch.tensor([margin], requires_grad=True), torch.zeros(1), torch.ones(1)
    if name == "aot" and divergence is not Divergence.reverse_kl:
        return  # which is refused
    loss = make_loss(name, divergence=divergence)
    value = loss(PairLogps(chosen, zero, one, one), PairLogps(zero, zero, one, one, score_gap=zero))
    (gradient,) = torch.autograd.grad(value.sum(), chosen)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_another_divergence_does_not_determine_the_loss_by_the_margin():
    assert DPO(divergence=Divergence.js).traits()["loss_at_zero_margin"] is None
    assert DPO().traits()["loss_at_zero_margin"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DPO(divergence=Divergence.alpha, divergence_alpha=0), "loss.divergence_alpha"),
        (lambda: CPO(divergence=Divergence.js), "loss.divergence=js: this loss has no reference"),
        (lambda: AOT(divergence=Divergence.js), "loss.divergence=js: .*type loss.divergence=reverse_kl"),
        (lambda: Mix(terms={"dpo": 1, "simpo": 1}, ld_alpha=0.5), "loss.ld_alpha=0.5: simpo .*type loss.ld_alpha=1"),
        (
            lambda: Mix(terms={"dpo": 1, "aot": 1}, weighting=Weighting.wpo),
            "loss.weighting=wpo: .*this loss is one of a whole step; type loss.weighting=none",
        ),
        (lambda: Mix(), r"loss.terms: names no loss; type e.g. .\+loss.terms="),
        (lambda: Mix(terms={"dop": 1}), "loss.terms: 'dop' is none of the losses aot"),
        (lambda: Mix(terms={"mix": 1}), "loss.terms: 'mix' is none"),
        (lambda: Mix(terms={"dpo": 1}, settings={"rpo": {"alpha": 1}}), "loss.settings: rpo is not among loss.terms"),
        (lambda: Mix(terms={"rpo": 1}, settings={"rpo": {"gamma": 1}}), "loss.settings.rpo: has no setting gamma"),
        (lambda: Mix(terms={"rpo": 1}, settings={"rpo": {"alpha": -1}}), "loss.alpha"),
        (lambda: EXO(label_smoothing=0), "loss.label_smoothing"),
        (lambda: DiscoPOP(tau=1.5), "loss.tau"),
        (lambda: DPOLength(alpha=-1), "loss.alpha"),
        (lambda: CPO(alpha=math.nan), "loss.alpha"),
        (lambda: SLiC(alpha=-0.1), "loss.alpha"),
        (lambda: ODPO(alpha=-0.1), "loss.alpha"),
        (lambda: KTO(desirable_weight=-1), "loss.desirable_weight"),
        (lambda: KTO(undesirable_weight=math.inf), "loss.undesirable_weight"),
        (
            lambda: Mix(terms={"dpo": 1}, settings={"dpo": {"ld_alpha": 0.5}}),
            "loss.settings.dpo: ld_alpha .*type loss.ld_alpha=0.5",
        ),
        (
            lambda: Mix(terms={"dpo": 1}, settings={"dpo": {"weighting": "wpo"}}),
            "loss.settings.dpo: weighting .*type loss.weighting=wpo",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, key):
    with pytest.raises(ValueError, match=key):
        make()
