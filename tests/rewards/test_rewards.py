"""Sources of rewards: their values by hand, their units, the queries that they count, and what they refuse."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_lab.data.collate import collate_responses
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.models.policy import Policy
from dpo_lab.models.reward_export import exported
from dpo_lab.models.reward_head import response_rewards, with_reward_head
from dpo_lab.rewards import REWARDS, Reward, RewardError, RewardInputs, Scale
from dpo_lab.rewards.gold import Gold
from dpo_lab.rewards.judge import OfJudge
from dpo_lab.rewards.learned import FACTS, Learned
from tests.support.fits import initial_policy

TASK = SyntheticReviews(temperature=0.5)
REVIEWS = TASK.texts(HELD_OUT, 6, seed=3)


@pytest.fixture(scope="module")
def inputs(policy: Policy) -> RewardInputs:
    encoder = PairTokenizer(policy.tokenizer, 96, 48)
    return RewardInputs(
        encoder=encoder,
        task=TASK,
        judge=Classifier(),
        initial=policy,
        prompts=[encoder.prompt(text) for text in TASK.prompts(HELD_OUT, 12, seed=0)],
        max_new_tokens=24,
        seed=5,
        device=torch.device("cpu"),
        context=nullcontext,
        tokens=512,
    )


@pytest.fixture(scope="module")
def tokens(inputs):
    """Reviews as prompts of one word and responses, with an end token except the last."""
    cuts = [text.index(" ") for text in REVIEWS]
    prompts = [inputs.encoder.prompt(text[:cut]) for text, cut in zip(REVIEWS, cuts, strict=True)]
    responses = [inputs.encoder.response(text[cut:], [1, 2]) for text, cut in zip(REVIEWS, cuts, strict=True)]
    assert responses[0][-1] == inputs.encoder.eos_id
    return prompts, [*responses[:-1], responses[-1][:-1]]


@pytest.fixture(scope="module")
def model_folder(inputs, tmp_path_factory) -> Path:
    """A reward model with a random head, as dpo_lab.reward leaves it."""
    folder = tmp_path_factory.mktemp("reward_model")
    model = with_reward_head(inputs.initial.model, seed=2)
    exported(model, inputs.initial.tokenizer, inputs.encoder.eos_id).save(folder)
    facts = {"mean": 0.25, "sd": 2.0, "samples": 8, "tokenizer": inputs.encoder.fingerprint, "judged_alike": 1.0}
    (folder / FACTS).write_text(json.dumps(facts))
    return folder


def raw(inputs, prompts, responses) -> np.ndarray:
    with torch.no_grad():
        model = with_reward_head(inputs.initial.model, seed=2)
        return response_rewards(model, *collate_responses(prompts, responses))[:, 0].double().numpy()


def test_gold_is_in_units_of_the_annotators_log_odds(inputs, tokens):
    reward = Gold().prepare(inputs)
    assert reward(*tokens) == pytest.approx([TASK.gold(text) / 0.5 for text in REVIEWS])
    assert reward.queries == 6
    assert inputs.gold(*tokens) is inputs.gold(*tokens)
    reward(*(part[:2] for part in tokens))
    assert reward.queries == 8
    assert reward([], []).shape == (0,)


def test_a_learned_reward_is_the_models_score_less_its_mean(inputs, tokens, model_folder):
    reward = Learned(path=str(model_folder)).prepare(inputs)
    assert reward(*tokens) == pytest.approx(raw(inputs, *tokens) - 0.25, abs=1e-5)
    assert np.ptp(raw(inputs, *tokens)) > 0.1
    unit = Learned(path=str(model_folder), scale=Scale.unit).prepare(inputs)
    assert unit(*tokens) == pytest.approx((raw(inputs, *tokens) - 0.25) / 2, abs=1e-5)


def test_the_judge_gives_the_same_scores_of_texts(inputs, tokens, model_folder):
    reward = OfJudge().prepare(replace(inputs, judge=Classifier(str(model_folder))))
    whole = [*tokens[1][:-1], [*tokens[1][-1], inputs.encoder.eos_id]]  # the judge's texts always end
    assert reward(*tokens) == pytest.approx(raw(inputs, tokens[0], whole), abs=1e-5)


def test_unit_scale_is_that_of_the_initial_policys_samples(inputs):
    with pytest.raises(RewardError, match=r"reward\.scale=unit: all responses .* type reward\.scale=preference"):
        Gold(scale=Scale.unit).prepare(inputs)  # random weights write no review
    by_length = replace(inputs, task=SyntheticReviews())
    by_length.task.gold = lambda text: float(len(text))  # type: ignore[method-assign,union-attr]
    reward = Gold(scale=Scale.unit).prepare(by_length)
    rewards = reward(inputs.prompts, inputs.samples())
    assert reward.queries == 2 * len(inputs.prompts)
    assert (rewards.mean(), rewards.std()) == pytest.approx((0, 1), abs=1e-9)


@pytest.mark.parametrize(
    ("reward", "changes", "message"),
    [
        (Gold(), {"task": None}, "reward=gold: these data have no gold reward; type reward=learned"),
        (OfJudge(), {}, r"reward=judge: no judge is set; type evals\.judge\.path="),
        (OfJudge(), {"judge": Classifier("nowhere")}, r"evals\.judge\.path=nowhere: no such folder"),
        (
            Learned(path="nowhere"),
            {},
            r"reward\.path=nowhere: not made by python -m dpo_lab\.reward .*type reward=judge",
        ),
    ],
)
def test_what_is_missing_is_named(inputs, reward: Reward, changes, message):
    with pytest.raises(ValueError, match=message):
        reward.prepare(replace(inputs, **changes))


def test_a_reward_model_of_another_tokenizer_is_refused(inputs, model_folder):
    other = replace(inputs, encoder=PairTokenizer(initial_policy().tokenizer, 96, 48))
    with pytest.raises(RewardError, match="trained with another tokenizer"):
        Learned(path=str(model_folder)).prepare(other)


def test_settings_are_checked():
    assert {"gold", "learned", "judge"} <= REWARDS.keys()
    for wrong in ({"steps": 0}, {"centring": -1.0}, {"lr": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=rf"reward\.{next(iter(wrong))}="):
            Learned(**wrong)
