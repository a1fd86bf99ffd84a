"""The base class of sources of rewards, and the function from responses to rewards that each prepares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dpo_lab.core.pairs import Tokens
from dpo_lab.core.registry import add_to_table
from dpo_lab.evals.judges import Judge

if TYPE_CHECKING:
    import torch

    from dpo_lab.data.tasks.base import Task
    from dpo_lab.data.tokenize import PairTokenizer
    from dpo_lab.models.policy import Policy

REWARDS: dict[str, type[Reward]] = {}  # by name in configs
ScoreTokens = Callable[[Sequence[Tokens], Sequence[Tokens]], np.ndarray]  # prompts, responses -> scores [N]


def texts_of(encoder: PairTokenizer, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[str]:
    """Return prompt and response as one text, without begin and end tokens."""
    return [encoder.prompt_text(list(p)) + encoder.text(list(r)) for p, r in zip(prompts, responses, strict=True)]


class RewardError(ValueError):
    """Raised where a reward can't be prepared; the message is one line that says what to type."""


class Scale(str, Enum):
    """The unit of rewards.

    With `preference` they are log-odds: sigma(r(a) - r(b)) is the probability that the annotator prefers a to b. So beta
    means what it means in DPO, and the optimum is reference x exp(reward / beta) / Z. With `unit` rewards have mean 0 and
    standard deviation 1 on samples of the initial policy; beta is then the price of a nat in these, and not comparable to
    that of a DPO run.
    """

    preference = "preference"
    unit = "unit"


@dataclass(frozen=True)
class RewardInputs:
    """What a reward is prepared from. task: the task if there is one, which knows the gold reward; initial: the initial
    policy, whose samples scale=unit refers to; prompts: of these samples, as token ids; max_new_tokens, seed: of these;
    device, context: of forward passes; tokens: approximate number of tokens per forward pass.
    """

    encoder: PairTokenizer
    task: Task | None
    judge: Judge
    initial: Policy
    prompts: Sequence[Tokens]
    max_new_tokens: int
    seed: int
    device: torch.device
    context: Callable[[], AbstractContextManager]
    tokens: int

    @cached_property
    def gold(self) -> ScoreTokens | None:
        """The task's reward of encoded prompts and responses, in its own unit; None without a task.

        It is computed once if it is asked for again for the same lists.
        """
        if self.task is None:
            return None
        of_text, last = self.task.gold, list[tuple[Sequence[Tokens], Sequence[Tokens], np.ndarray]]()

        def gold(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> np.ndarray:
            if not (last and last[0][0] is prompts and last[0][1] is responses):
                texts = texts_of(self.encoder, prompts, responses)
                last[:] = [(prompts, responses, np.array([of_text(text) for text in texts]))]
            return last[0][2]

        return gold

    def samples(self) -> list[Tokens]:
        """Sample a response of the initial policy to each prompt."""
        from dpo_lab.models.sampling import generate_responses

        with self.context():
            samples = generate_responses(
                self.initial.model,
                self.encoder,
                self.prompts,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                what="Samples (scale of rewards)",
            )
        return [sample.tokens for sample in samples]


@dataclass
class RewardFunction:
    """reward(prompts, responses) -> rewards [N] of responses as token ids, with the end token where it was sampled.

    All ranks have to call it with the same arguments, and get all rewards. queries: the number of responses scored so
    far; mean, sd: what is subtracted from scores, and what they are then divided by.
    """

    score: ScoreTokens
    mean: float = 0.0
    sd: float = 1.0
    queries: int = 0

    @property
    def model(self) -> torch.nn.Module | None:
        """The model that gives the scores, if it is kept in memory for them alone."""
        return getattr(self.score, "model", None)

    def __call__(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> np.ndarray:
        self.queries += len(responses)
        if not len(responses):
            return np.zeros(0)
        return (np.asarray(self.score(prompts, responses), np.float64) - self.mean) / self.sd


@dataclass
class Reward:
    """The base class of sources of rewards. A subclass defines `load` and states its name in configs; reads_labels: whether
    it depends on the labels of the run's pairs, and so on their noise.
    """

    name: ClassVar[str]
    reads_labels: ClassVar[bool]
    scale: Scale = Scale.preference

    def __init_subclass__(cls, *, name: str, reads_labels: bool = False) -> None:
        cls.name, cls.reads_labels = name, reads_labels
        add_to_table(REWARDS, name, cls)

    def check(self, has_gold: bool, judge: Judge) -> None:
        """Raise ValueError if the reward needs a gold reward and the data have none, or a judge that is not set."""

    def files(self) -> list[Path]:
        """Return the user's files that the reward is loaded from."""
        return []

    def measured(self) -> dict[str, Any]:
        """Return what is known of the reward's accuracy, for the run record."""
        return {}

    def prepare(self, inputs: RewardInputs) -> RewardFunction:
        """Return the function that gives rewards; a collective. Raises RewardError if it can't be loaded."""
        reward = RewardFunction(self.load(inputs))
        if self.scale is Scale.unit:
            reward.mean, reward.sd = self.moments(reward, inputs)
            if not reward.sd > 0:
                raise RewardError("reward.scale=unit: all responses have the same reward; type reward.scale=preference")
        return reward

    def load(self, inputs: RewardInputs) -> ScoreTokens:
        """Return the function that gives scores in log-odds."""
        raise NotImplementedError

    def moments(self, score: ScoreTokens, inputs: RewardInputs) -> tuple[float, float]:
        """Return mean and standard deviation of the scores of the initial policy's samples."""
        scores = score(inputs.prompts, inputs.samples())
        return float(np.mean(scores)), float(np.std(scores))
