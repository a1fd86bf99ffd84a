"""The gold reward of a task, in units of the annotator's log-odds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.rewards.base import Reward, RewardInputs, ScoreTokens, texts_of

if TYPE_CHECKING:
    from dpo_lab.data.tasks.base import Task
    from dpo_lab.data.tokenize import PairTokenizer


@dataclass
class Gold(Reward, name="gold"):
    """The task's gold reward divided by its annotator's temperature, which is the reward that DPO recovers."""

    def check(self, has_gold, judge) -> None:
        if not has_gold:
            raise ValueError(
                "reward=gold: these data have no gold reward; type reward=learned or reward=judge evals.judge.path=FOLDER"
            )

    def load(self, inputs: RewardInputs) -> ScoreTokens:
        self.check(inputs.task is not None, inputs.judge)
        task = inputs.task
        assert task is not None
        gold = gold_of(task, inputs.encoder)
        return lambda *tokens: gold(*tokens) / task.temperature


def gold_of(task: Task, encoder: PairTokenizer) -> ScoreTokens:
    """Return the task's reward of encoded prompts and responses, in its own unit."""
    return lambda *tokens: np.array([task.gold(text) for text in texts_of(encoder, *tokens)])
