"""The synthetic review task: short reviews with an exact gold reward and a decidable grammar.

`grammar.py` writes reviews of an exact number of clauses and parses any text; here is what an experiment needs of them.
Gold reward: the weighted mean of the clauses' valences, so that length buys nothing (`reward=sum` lets it be bought, to
study length exploitation). What is no clause counts as a clause worth 0. A review of three clauses has a gold reward of
mean 0 and standard deviation 1. The default temperature of the annotator is chosen so that at beta 0.1 a run ends far
above its start with its language intact.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.splits import split_of
from dpo_lab.data.tasks import grammar
from dpo_lab.data.tasks.base import Task


class Reward(str, Enum):
    """How clause valences become one reward."""

    mean = "mean"
    sum = "sum"


@dataclass
class SyntheticReviews(Task):
    """Settings of the embedded world: its shape and its reward."""

    decides_form: ClassVar[bool] = True
    min_clauses: int = 3
    max_clauses: int = 3
    reward: Reward = Reward.mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_clauses <= self.max_clauses:
            raise ValueError(
                f"data.world.min_clauses={self.min_clauses}, max_clauses={self.max_clauses}: need"
                " 1 <= min <= max; type e.g. data.world.min_clauses=1 data.world.max_clauses=6"
            )

    def reviews(self, split: str, count: int, seed: int) -> list[str]:
        """`count` reviews of a split."""
        return self._of_split(grammar.sample_review, split, count, seed, "reviews")

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """`count` prompts of a split; a prompt may come more than once."""
        return self._of_split(grammar.sample_prompt, split, count, seed, "prompts")

    def gold(self, text: str) -> float:
        """The exact reward of a whole review, prompt included."""
        clauses = grammar.parse(text).clauses
        total = sum(c.weight * c.valence for c in clauses)
        if self.reward is Reward.sum or not clauses:
            return total
        return total / sum(c.weight for c in clauses)

    def well_formed(self, text: str) -> bool:
        """Whether the text is a review of this world: in the grammar, with a permitted number of clauses."""
        review = grammar.parse(text)
        return review.well_formed and self.min_clauses <= len(review.clauses) <= self.max_clauses

    def _of_split(self, draw: Callable, split: str, count: int, seed: int, kind: str) -> list[str]:
        rng = random.Random(derive_seed(seed, f"world/{kind}/{split}"))
        texts: list[str] = []
        while len(texts) < count:
            text = draw(rng, rng.randint(self.min_clauses, self.max_clauses))
            if split_of(text) == split:
                texts.append(text)
        return texts
