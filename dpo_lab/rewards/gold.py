"""The gold reward of a task, in units of the annotator's log-odds."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.rewards.base import Reward, RewardInputs, ScoreTokens


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
        task, gold = inputs.task, inputs.gold
        assert task is not None
        assert gold is not None
        return lambda *tokens: gold(*tokens) / task.temperature
