"""What online methods take and tell: scores of pairs, losses that are logged, passes that are counted, bad rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_lab.core.losses import LOSSES
from dpo_lab.core.methods.online_dpo import OnlineDPO
from dpo_lab.core.methods.ppo import PPO
from dpo_lab.core.methods.rloo import RLOO
from dpo_lab.models.critic import Critic
from dpo_lab.models.reference import Uniform
from dpo_lab.pipelines.online import rollout_costs
from dpo_lab.training.nonfinite import NotFinite
from tests.support.online_fit import prepare
from tests.support.small_fit import IGNORED, run
from tests.training.test_online import make_model, make_optim

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED]

SIZES: dict[str, Any] = dict(prompts=4, samples=2)


def prepared(method, **parts):
    return prepare(method, **parts)(make_model(), make_optim(), total_steps=4, tokens_per_microbatch=4096)


def test_a_loss_of_scores_takes_those_of_the_reward_and_metrics_the_gold():
    _, data = prepared(OnlineDPO(**SIZES), loss=LOSSES["odpo"](0.5))
    reward = data.actor.reward
    data.actor.gold = lambda *tokens: 100 - 3 * reward(*tokens)
    batch = data.batch(0)
    assert batch.score_gap.abs().sum() > 0
    torch.testing.assert_close(batch.gold_margin, -3 * batch.score_gap, atol=1e-4, rtol=0)


def test_the_loss_of_the_policy_and_that_of_the_critic_are_logged_apart():
    module, data = prepared(PPO(**SIZES, minibatches=1, epochs=1))
    batch = data.batch(0)
    both = module.part_loss(batch).item() / 8
    found = module.train_metrics.compute()
    expected = -(batch.advantages * batch.weights).sum().item() / 8  # every ratio is 1
    assert found["policy_loss"] == pytest.approx(expected, abs=1e-5)
    assert found["critic/loss"] == pytest.approx(both - expected, abs=1e-5)
    assert found["critic/loss"] > 1e-3


@pytest.mark.parametrize(
    ("method", "parts", "expected"),
    [
        (PPO(**SIZES, minibatches=2, epochs=2), {}, {"policy": 5 * 4, "reference": 16, "critic": 5 * 4 + 16}),
        (OnlineDPO(**SIZES), {}, {"policy": 40, "reference": 40}),
        (OnlineDPO(**SIZES), {"loss": LOSSES["aot"](0.5)}, {"policy": 80, "reference": 80}),
        (OnlineDPO(**SIZES), {"loss": LOSSES["kto"](0.5)}, {"policy": 100, "reference": 100}),
        (OnlineDPO(**SIZES), {"reference": Uniform()}, {"policy": 40}),
    ],
    ids=["cut rollout", "pairs", "whole step", "mismatched", "uniform"],
)
def test_passes_are_those_of_the_steps_that_were_made(method, parts, expected, tmp_path):
    """5 steps; PPO's second rollout is trained on once of four times."""
    data = run(tmp_path, prepare=prepare(method, **parts), steps=5).datamodule  # type: ignore[attr-defined]
    assert rollout_costs(data, 0)["forward_passes"] == expected


def test_passes_are_those_that_a_module_makes():
    """The responses that the reference of KTO runs in a step, by a count: a fifth of those of the 5 steps above."""
    module, data = prepared(OnlineDPO(**SIZES), loss=LOSSES["kto"](0.5))
    batch, reference, counts = data.batch(0), module.reference, []

    def counted(part):
        counts.append(int((part.lengths[:, 1:] > 0).sum()))
        return reference(part)

    module.reference = counted
    module.linear = {id(batch): module._linearize([module._score(batch)], is_training=True)}
    module.part_loss(batch)
    assert sum(counts) == 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_named(value):
    _, data = prepared(RLOO(**SIZES))
    data.actor = replace(data.actor, reward=lambda prompts, responses: np.full(len(responses), value), source="judge")
    with pytest.raises(NotFinite, match=rf"reward=judge: 8 of 8 rewards are not finite; .* is {value}. Type another"):
        data.batch(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_critics_head_has_the_dtype_of_the_weights_that_are_trained(dtype):
    model = Critic(make_model().to(dtype)).model
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {dtype}
