"""The judge's score as a reward."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.evals.judges import JudgeError, Scorer
from dpo_lab.rewards.base import Reward, RewardError, RewardInputs, ScoreTokens, texts_of


@dataclass
class OfJudge(Reward, name="judge"):
    """The score of the judge that `evals.judge` sets, of prompt and response as one text: a reward model's output or the
    log-odds of a class.
    """

    def check(self, has_gold, judge) -> None:
        if not judge.gives_scores:
            raise ValueError(
                f"reward=judge: evals/judge={judge.name} compares two responses and scores none; type evals/judge=classifier"
                " evals.judge.path=FOLDER"
            )
        if not judge.is_set:
            raise ValueError("reward=judge: no judge is set; type evals.judge.path=FOLDER of a classifier with it")

    def load(self, inputs: RewardInputs) -> ScoreTokens:
        self.check(inputs.task is not None, inputs.judge)
        try:
            judge = inputs.judge.load(inputs.device)
        except JudgeError as error:
            raise RewardError(str(error)) from None
        assert isinstance(judge, Scorer)
        return lambda *tokens: judge.score(texts_of(inputs.encoder, *tokens))
