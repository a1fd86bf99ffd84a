"""A fit of milliseconds by an online method, whose reward is a number of the tokens of a response."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from dpo_lab.core.losses import DPO
from dpo_lab.core.methods import Online, PolicyGradient
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.critic import Critic
from dpo_lab.models.reference import Frozen
from dpo_lab.training.actor import Actor
from dpo_lab.training.online_data import FreshPairs, OnlineDataModule, RolloutData
from dpo_lab.training.policy_gradient_module import PolicyGradientModule
from dpo_lab.training.step_level_module import module_for
from tests.support.small_fit import HELD_OUT, PAIRS, TOKENIZER

LONGEST = 6


def reward(prompts, responses) -> np.ndarray:
    """The share of even tokens."""
    return np.array([np.mean(np.asarray(response) % 2 == 0) for response in responses])


def prepare(method: Online, loss=None, reference=None):
    """Return what small_fit.run takes as `prepare`."""

    def make(model, optim, **step: Any) -> tuple[Any, OnlineDataModule]:
        encoder = PairTokenizer(TOKENIZER, 64, 32, True)
        prompts = [list(tokens) for tokens in {tuple(pair.prompt): 0 for pair in PAIRS}]
        own = loss or DPO(0.5)
        logps: Any = (reference or Frozen()).prepare(model, (), None)  # type: ignore[arg-type]
        critic = Critic(model) if method.has_critic else None
        actor = Actor(model, method, reward, reward, encoder, nullcontext, LONGEST, 40, reference=logps, critic=critic)
        if isinstance(method, PolicyGradient):
            data: OnlineDataModule = RolloutData(method, actor, prompts, HELD_OUT, seed=5)
            return PolicyGradientModule(model, own, logps, optim, method=method, critic=critic, **step), data
        data = FreshPairs(method, actor, prompts, HELD_OUT, seed=5, loss=own)
        return module_for(own)(model, own, logps, optim, batch_size=method.prompts_per_step, **step), data

    return make
