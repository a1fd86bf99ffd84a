"""Methods on an enumerable task: gradients by enumeration, fixed points in closed form, advantages by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_lab.core.advantages import generalised_advantages, group_centred, k1, k2, k3, leave_one_out
from dpo_lab.core.losses import LOSSES, PairLogps
from dpo_lab.core.methods.base import METHODS, clipped, clipped_share
from dpo_lab.core.methods.grpo import GRPO, KLPrice, Normalise, Scale
from dpo_lab.core.methods.online_dpo import Candidates, Labels, OnlineDPO
from dpo_lab.core.methods.ppo import PPO
from dpo_lab.core.methods.rloo import RLOO
from dpo_lab.core.rollouts import spread
from tests.support.bandit import Bandit, total_variation

BETAS = (0.3, 1.0, 3.0)
BANDIT = Bandit.random(prompts=3, responses=4)
SMALL = Bandit.random(prompts=2, responses=3, seed=1)  # whose 27 groups of three are enumerated in every step
UNBIASED = {
    "rloo": lambda beta: RLOO(beta=beta),
    "ppo": lambda beta: PPO(beta=beta, whiten=False),
    "grpo, the price in the reward": lambda beta: GRPO(beta=beta, scale=Scale.none, kl=KLPrice.reward),
}
STARTS = [
    torch.zeros(3, 4, dtype=torch.float64),
    torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
]


@pytest.mark.parametrize("start", STARTS, ids=["uniform", "random"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", UNBIASED)
def test_expected_gradient_is_that_of_the_objective(name, beta, start):
    logits = start.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-BANDIT.objective(logits, beta), logits)
    shrinks = 3 / 4 if name.startswith("grpo") else 1  # the baseline of a group holds the response itself
    found = BANDIT.expected_gradient(UNBIASED[name](beta), start, samples=4)
    torch.testing.assert_close(found, shrinks * exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kl", [KLPrice.k2, KLPrice.k3, KLPrice.k3_weighted])
def test_price_in_the_loss_has_the_gradient_of_its_divergence(kl, beta):
    """That of k2 and of k3 times the ratio is that of KL(pi || reference), k3's that of KL(reference || pi)."""
    logits = STARTS[1].clone().requires_grad_()
    logps = logits.log_softmax(1)
    reverse = (logps.exp() * (logps - BANDIT.reference)).sum()
    forward = (BANDIT.reference.exp() * (BANDIT.reference - logps)).sum()
    rewards = (logps.exp() * BANDIT.rewards).sum()
    (exact,) = torch.autograd.grad(beta * (forward if kl is KLPrice.k3 else reverse) - 3 / 4 * rewards, logits)
    found = BANDIT.expected_gradient(GRPO(beta=beta, scale=Scale.none, kl=kl), STARTS[1], samples=4)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def fixed_point(method, bandit: Bandit = SMALL) -> torch.Tensor:
    """The policy that the expected gradient of a method, on groups of three, leads to from the reference."""
    logits = bandit.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.96)
    for _ in range(200):
        logits.grad = bandit.expected_gradient(method, logits, samples=3)
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(1)


@pytest.mark.parametrize(
    "beta", [pytest.param(0.3, marks=pytest.mark.extended), 1.0, pytest.param(3.0, marks=pytest.mark.extended)]
)
def test_fixed_points_of_grpo(beta):
    """In closed form where rewards are not divided by the group's spread; elsewhere neither of these."""
    shrunk = beta * 3 / 2  # beta K / (K - 1)
    reached = {kl: fixed_point(GRPO(beta=beta, scale=Scale.none, kl=kl)) for kl in KLPrice}
    assert total_variation(reached[KLPrice.reward], SMALL.optimum(beta)) < 1e-3
    for kl in (KLPrice.k2, KLPrice.k3_weighted):
        assert total_variation(reached[kl], SMALL.optimum(shrunk)) < 1e-3
    assert total_variation(reached[KLPrice.k3], SMALL.forward_kl_optimum(shrunk)) < 1e-3
    scaled = fixed_point(GRPO(beta=beta, kl=KLPrice.k2))
    assert total_variation(scaled, SMALL.optimum(beta)) > 0.03


def test_grpo_scaled_by_its_group_does_not_feel_the_size_of_rewards():
    """Rewards ten times as large lead elsewhere under scale=none, and to the same policy under scale=group."""
    larger = Bandit(10 * SMALL.rewards, SMALL.reference)
    scaled = [fixed_point(GRPO(beta=1.0, kl=KLPrice.k2), bandit) for bandit in (SMALL, larger)]
    plain = [fixed_point(GRPO(beta=1.0, scale=Scale.none, kl=KLPrice.k2), bandit) for bandit in (SMALL, larger)]
    assert total_variation(*scaled) < 1e-2 < 0.1 < total_variation(*plain)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", UNBIASED)
def test_sampled_training_reaches_the_optimum(name, beta):
    method, generator = UNBIASED[name](beta), torch.Generator().manual_seed(0)
    logits = BANDIT.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    prompts = torch.arange(3).repeat(64)
    for _ in range(300):
        responses = torch.multinomial(logits.detach().softmax(1)[prompts], 4, True, generator=generator)
        optimizer.zero_grad()
        BANDIT.loss(method, logits, prompts, responses).mean().backward()
        optimizer.step()
        schedule.step()
    assert total_variation(logits.detach().softmax(1), BANDIT.optimum(beta)) < 0.03


@pytest.mark.parametrize("beta", BETAS)
def test_online_dpo_reaches_the_optimum(beta):
    method, generator = OnlineDPO(), torch.Generator().manual_seed(0)
    loss, logits = LOSSES["dpo"](beta=beta), BANDIT.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    prompts = torch.arange(3).repeat(64)
    for _ in range(400):
        responses = torch.multinomial(logits.detach().softmax(1)[prompts], 2, True, generator=generator)
        sides = method.choose(BANDIT.rewards[prompts[:, None], responses], generator)
        one = torch.ones(len(prompts), dtype=torch.float64)
        tokens = [responses.gather(1, side[:, None])[:, 0] for side in sides]
        policy, reference = (
            PairLogps(*(table[prompts, each] for each in tokens), one, one)
            for table in (logits.log_softmax(1), BANDIT.reference)
        )
        optimizer.zero_grad()
        loss(policy, reference).mean().backward()
        optimizer.step()
        schedule.step()
    assert total_variation(logits.detach().softmax(1), BANDIT.optimum(beta)) < 0.03


def test_choice_of_a_pair():
    rewards = torch.tensor([[0.0, 5.0, -3.0], [2.0, -100.0, 100.0]])
    generator = torch.Generator().manual_seed(0)
    sign = OnlineDPO(labels=Labels.sign)
    assert [side.tolist() for side in sign.choose(rewards, generator)] == [[1, 0], [0, 1]]
    extremes = replace(sign, samples=3, candidates=Candidates.extremes)
    assert [side.tolist() for side in extremes.choose(rewards, generator)] == [[1, 2], [2, 1]]
    many = torch.tensor([[1.0, 0.0]]).repeat(20000, 1)
    chosen, rejected = OnlineDPO().choose(many, generator)
    assert (chosen + rejected == 1).all()
    share = (chosen == 0).double().mean().item()
    assert abs(share - 0.7310586) < 4 * (0.731 * 0.269 / 20000) ** 0.5  # sigma(1)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5]]
    assert group_centred(rewards, divides=False).tolist() == [[-2.0, -1.0, 3.0]]
    scaled = group_centred(rewards, divides=True, eps=0.0)  # sd: sqrt(14 / 2)
    torch.testing.assert_close(scaled, torch.tensor([[-2.0, -1.0, 3.0]]) / 7**0.5)


def test_generalised_advantages_by_hand():
    """Two responses of 2 tokens and 1, gamma .5, lambda .5.

    First: delta = (1 + .5 * 4 - 2, 3 - 4) = (1, -1); A = (1 + .25 * -1, -1). Second: A = 5 - 1.
    """
    advantages, returns = generalised_advantages(
        torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 4.0, 1.0]), np.array([2, 1]), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [0.75, -1.0, 4.0]
    assert returns.tolist() == [2.75, 3.0, 5.0]


def test_generalised_advantages_at_their_limits():
    """lambda 1: the sum of later rewards minus the value; lambda 0: the temporal difference."""
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([3, 1, 4])
    rewards, values = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    later = torch.cat([each.flip(0).cumsum(0).flip(0) for each in rewards.split(lengths.tolist())])
    following = torch.cat([torch.cat((each[1:], each.new_zeros(1))) for each in values.split(lengths.tolist())])
    torch.testing.assert_close(generalised_advantages(rewards, values, lengths, 1.0, 1.0)[0], later - values)
    torch.testing.assert_close(
        generalised_advantages(rewards, values, lengths, 1.0, 0.0)[0], rewards + following - values
    )


def test_kl_estimators():
    """By enumeration: k1 and k3 are unbiased, k2 is not; k3 is the least noisy of the unbiased where policies are close."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    ratios = (policy / reference).log()
    exact = (policy * ratios).sum()
    means = [(policy * estimate(ratios)).sum() for estimate in (k1, k2, k3)]
    torch.testing.assert_close(means[0], exact)
    torch.testing.assert_close(means[2], exact)
    assert abs(means[1] - exact) > 1e-4
    variances = [(policy * (estimate(ratios) - exact).square()).sum() for estimate in (k1, k3)]
    assert variances[1] < variances[0] / 10
    assert (k3(torch.linspace(-3, 3, 7)) >= 0).all()


def test_clipping_by_hand():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    torch.testing.assert_close(clipped(ratios, advantages, 0.2), torch.tensor([1.2, -1.5, 0.5, -0.8, 2.0]))
    assert clipped_share(ratios, advantages, 0.2).tolist() == [True, False, False, True, False]


def sequences(beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables of a task of two tokens out of three: rewards [3, 3], reference logits of the first and of the second."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, generator=generator, dtype=torch.float64), *torch.randn(
        2, 3, 3, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("kind", ["rloo", "ppo"])
def test_gradient_on_responses_of_two_tokens(kind):
    """By enumeration of all pairs of responses: the KL price of a later token counts for the earlier one too."""
    beta, samples = 0.7, 2
    rewards, first, second = sequences(beta)
    policy = [torch.zeros(3, dtype=torch.float64).requires_grad_(), second.flip(0).clone().requires_grad_()]
    reference = [first[0].log_softmax(0), second.log_softmax(1)]

    def logps(tables):
        return tables[0].log_softmax(0)[:, None].expand(3, 3), tables[1].log_softmax(1)

    own, base = logps(policy), logps(reference)
    joint = (own[0] + own[1]).exp()
    objective = (joint * (rewards - beta * (own[0] + own[1] - base[0] - base[1]))).sum()
    exact = torch.autograd.grad(-objective, policy, retain_graph=True)
    # the value before a token is the expected reward, less the prices of it and of later tokens
    after = (own[1].exp() * (rewards - beta * (own[1] - base[1]))).sum(1).detach()
    before = (own[0][:, 0].exp() * (after - beta * (own[0] - base[0])[:, 0])).sum().detach()
    pairs = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    firsts, seconds = (torch.tensor([[pair[i], pair[i + 2]] for pair in pairs]) for i in (0, 1))
    rows = [torch.stack((x[0][firsts, 0], x[1][firsts, seconds]), -1).flatten() for x in (own, base)]
    values = torch.stack((before.expand(firsts.shape), after[firsts]), -1).flatten()
    method = RLOO(beta=beta) if kind == "rloo" else PPO(beta=beta, lam=0.9, whiten=False)
    bandit = Bandit(rewards.view(1, 9), torch.zeros(1, 9).double())
    rollouts = bandit.rollouts(
        torch.zeros(1, 9).double(), torch.zeros(81, dtype=torch.long), 3 * firsts + seconds, beta
    )
    lengths = np.tile([1, 2, 2], (81, 1))
    rollouts = replace(rollouts, lengths=lengths, behaviour=rows[0].detach(), reference=rows[1].detach(), values=values)
    advantages, _ = method.advantages(rollouts)
    weights = torch.full((324,), 0.5 if kind == "rloo" else 1.0).double()  # RLOO: the mean of a response's tokens
    rollouts = replace(rollouts, advantages=advantages, weights=weights)
    losses = method.loss(rows[0], rollouts).reshape(81, -1).sum(1) / samples
    found = torch.autograd.grad((losses * joint.detach()[firsts, seconds].prod(1)).sum(), policy)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_weights_of_tokens():
    lengths = np.array([[2, 4], [3, 3]])
    of = {normalise: GRPO(normalise=normalise).token_weights(lengths, 6) for normalise in Normalise}
    assert of[Normalise.sequence].tolist() == [[1 / 2, 1 / 4], [1 / 3, 1 / 3]]
    assert of[Normalise.token].tolist() == [[1 / 3] * 2] * 2
    assert of[Normalise.constant].tolist() == [[1 / 6] * 2] * 2
    assert spread(torch.from_numpy(lengths).float(), lengths).tolist() == [2, 2, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3]


def test_beta_follows_its_target():
    method = PPO(kl_target=2.0, kl_gain=0.1)
    assert method.next_beta(1.0, 2.0) == 1.0
    assert method.next_beta(1.0, 100.0) == pytest.approx(1.02)
    assert method.next_beta(1.0, 0.0) == pytest.approx(0.98)
    assert PPO().next_beta(1.0, 100.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "method.samples=1: must be 2 or more"),
        (
            {"prompts": 9, "minibatches": 2},
            "method.minibatches=2: must divide method.prompts=9; type method.prompts=10",
        ),
        ({"beta": 0.0}, "beta=0.0: must be a positive number"),
        ({"clip": 0.0}, "method.clip=0.0: must be above 0"),
        ({"max_new_tokens": 0}, "method.max_new_tokens=0: must be 1 or more"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RLOO(**settings)


def test_samples_that_are_not_compared_are_refused():
    with pytest.raises(
        ValueError, match=r"method.samples=4: .*first_two .*type method.samples=2, or method.candidates="
    ):
        OnlineDPO(samples=4)


def test_table_of_methods():
    assert {*METHODS} == {"dpo", "online_dpo", "rloo", "grpo", "ppo"}
    assert [name for name, kind in METHODS.items() if kind.uses_loss] == ["dpo", "online_dpo"]
