"""DPO against its closed forms, over one prompt and six responses; and docs/dpo.md against the code that it names."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch
from torch import Tensor

from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import PairLogps
from tests.conftest import REPOSITORY

REWARD = torch.tensor([1.0, 0.3, -0.2, 0.6, -0.8, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.05, 0.3, 0.25, 0.1, 0.2, 0.1], dtype=torch.float64)
BETAS = [0.1, 0.5, 1.0]


def optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """reference x exp(reward / beta) / Z."""
    return (reference.log() + reward / beta).softmax(0)


def objective(policy: Tensor, beta: float) -> float:
    """E[reward] - beta KL(policy || REFERENCE)."""
    return (policy * (REWARD - beta * (policy.log() - REFERENCE.log()))).sum().item()


def trained_by_dpo(reference_logps: Tensor, preference: Tensor, beta: float) -> Tensor:
    """The policy that DPO ends at, trained on every ordered pair, weighted by how often it is labelled so."""
    first, second = (i.flatten() for i in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
    apart = first != second
    first, second = first[apart], second[apart]
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )
    ones = torch.ones(len(first))

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        policy = PairLogps(logps[first], logps[second], ones, ones)
        reference = PairLogps(reference_logps[first], reference_logps[second], ones, ones)
        loss = (preference[first, second] * DPO(beta)(policy, reference)).sum()
        loss.sum().backward()
        return loss.sum()

    optimizer.step(closure)
    return logits.detach().softmax(0)


def bradley_terry(reward: Tensor) -> Tensor:
    return (reward[:, None] - reward[None, :]).sigmoid()


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation."""
    return 0.5 * (one - other).abs().sum().item()


@pytest.mark.parametrize("beta", BETAS)
def test_the_tilted_reference_is_the_optimum(beta):
    best = optimum(REFERENCE, REWARD, beta)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        other = (best.log() + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)).softmax(0)
        gap = (other * (other.log() - best.log())).sum().item()
        assert objective(best, beta) - objective(other, beta) == pytest.approx(beta * gap)
        assert gap > 0


@pytest.mark.parametrize("beta", BETAS)
def test_the_implicit_reward_is_the_reward(beta):
    implicit = beta * (optimum(REFERENCE, REWARD, beta).log() - REFERENCE.log())
    constant = beta * math.log((REFERENCE * (REWARD / beta).exp()).sum().item())
    assert (implicit + constant).tolist() == pytest.approx(REWARD.tolist())


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_reaches_the_optimum(beta):
    policy = trained_by_dpo(REFERENCE.log(), bradley_terry(REWARD), beta)
    assert distance(policy, optimum(REFERENCE, REWARD, beta)) < 1e-4
    assert distance(REFERENCE, optimum(REFERENCE, REWARD, beta)) > 0.1  # it had some way to go


@pytest.mark.parametrize("beta", BETAS)
def test_without_a_reference_the_optimum_forgets_it(beta):
    policy = trained_by_dpo(torch.zeros(6, dtype=torch.float64), bradley_terry(REWARD), beta)
    assert distance(policy, (REWARD / beta).softmax(0)) < 1e-4
    assert distance(policy, optimum(REFERENCE, REWARD, beta)) > 0.02


# Rewards of six responses to each of three prompts, up to a constant a prompt: no label says more.
REWARDS = torch.stack((REWARD, REWARD.flip(0) * 1.5 + 2, REWARD.roll(2) - 1))


@pytest.mark.parametrize("beta", BETAS)
def test_the_implicit_reward_of_the_trained_policy_is_the_reward(beta):
    """Over prompts x responses, a constant per prompt apart: correlation of at least 0.999."""
    found = []
    for reward in REWARDS:
        policy = trained_by_dpo(REFERENCE.log(), bradley_terry(reward), beta)
        assert distance(policy, optimum(REFERENCE, reward, beta)) < 0.02
        found.append(beta * (policy.log() - REFERENCE.log()))
    implicit, true = (rows - rows.mean(1, keepdim=True) for rows in (torch.stack(found), REWARDS))
    assert torch.corrcoef(torch.stack((implicit.flatten(), true.flatten())))[0, 1].item() >= 0.999
    assert implicit.tolist() == [pytest.approx(row, abs=1e-3) for row in true.tolist()]  # its scale, too


def likeliest_reward(seen: Tensor) -> Tensor:
    """The Bradley-Terry reward under which preferences [K, K] that no reward explains are likeliest, by Zermelo's iteration."""
    strength = torch.ones(len(seen), dtype=torch.float64)
    wins, apart = seen.fill_diagonal_(0).sum(1), 1 - torch.eye(len(seen), dtype=torch.float64)
    for _ in range(5000):
        strength = wins / (apart / (strength[:, None] + strength[None, :])).sum(1)
        strength = strength / strength.sum()
    return strength.log()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_flipped_labels_lead_to_the_likeliest_reward(rate, beta):
    """Six responses: flips leave no reward that explains all labels; DPO ends at the one that explains them best."""
    seen = rate + (1 - 2 * rate) * bradley_terry(REWARD)
    reward = likeliest_reward(seen.clone())
    policy = trained_by_dpo(REFERENCE.log(), seen, beta)
    assert distance(policy, optimum(REFERENCE, reward, beta)) < 1e-3
    assert distance(policy, optimum(REFERENCE, REWARD, beta)) > 0.02  # not at the true one
    shrunk = (reward - reward.mean()).norm() / (REWARD - REWARD.mean()).norm()
    assert shrunk.item() == pytest.approx(1 - 2 * rate, abs=0.05)  # about the slope at a preference of one half


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_flips_shrink_the_margin(rate):
    """Two responses, preferred with probability p: the margin ends at logit(e + (1 - 2e) p) / beta."""
    p, beta = 0.8, 0.5
    seen = rate + (1 - 2 * rate) * p
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    optimizer = torch.optim.LBFGS(
        [margin], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        as_labelled, as_flipped = (PairLogps(m, zero, one, one) for m in (margin, -margin))
        reference = PairLogps(zero, zero, one, one)
        loss = seen * DPO(beta)(as_labelled, reference) + (1 - seen) * DPO(beta)(as_flipped, reference)
        loss.sum().backward()
        return loss.sum()

    optimizer.step(closure)
    assert margin.item() == pytest.approx(math.log(seen / (1 - seen)) / beta, abs=1e-5)


PAGE = (REPOSITORY / "docs" / "dpo.md").read_text()


def names_in(path: str) -> set[str]:
    nodes = ast.walk(ast.parse((REPOSITORY / path).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_docs_name_code_that_is_there():
    named = re.findall(r"`((?:dpo_lab|tests)/[\w/]+\.py)` `(\w+)`", PAGE)
    assert len(named) >= 12
    assert [(path, name) for path, name in named if name not in names_in(path)] == []


def test_docs_name_tests_that_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 15
    assert [(path, name) for path, name in named if name not in names_in(path)] == []


def test_every_step_names_code_and_test():
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert [s[:2] for s in sections[:5]] == ["1.", "2.", "3.", "4.", "5."]
    assert [s.splitlines()[0] for s in sections if "Code: " not in s or "Test: " not in s] == []
