"""The synthetic review task: short reviews with an exact gold reward and a decidable grammar.

`grammar.py` samples reviews of a given number of clauses and parses any text; this module computes rewards and prompts.
Gold reward: the weighted mean of the clauses' valences, so that it can't be raised by length (with `reward=sum` it can,
to study length exploitation). A stretch that is not a clause counts as one of valence 0. For reviews of three clauses
the gold reward has mean 0 and standard deviation 1. With the default temperature of the annotator, a run at beta 0.1
gains much reward and stays in the grammar.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from dpo_lab.data.tasks import grammar
from dpo_lab.data.tasks.base import Task


class Reward(str, Enum):
    """How the valences of clauses are combined to one reward."""

    mean = "mean"
    sum = "sum"


@dataclass
class SyntheticReviews(Task, name="embedded", has_grammar=True, complete_texts=True):
    """Settings of the synthetic reviews: their number of clauses and their reward."""

    min_clauses: int = 3
    max_clauses: int = 3
    reward: Reward = Reward.mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_clauses <= self.max_clauses:
            raise ValueError(
                f"data.task.min_clauses={self.min_clauses}, max_clauses={self.max_clauses}: need"
                " 1 <= min <= max; type e.g. data.task.min_clauses=1 data.task.max_clauses=6"
            )

    def texts(self, split: str, count: int, seed: int) -> list[str]:
        """Return `count` reviews of a split."""
        return self.draw(lambda rng: grammar.sample_review(rng, self._clauses(rng)), split, count, seed, "reviews")

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """Return `count` prompts of a split; prompts may repeat."""
        return self.draw(lambda rng: grammar.sample_prompt(rng, self._clauses(rng)), split, count, seed, "prompts")

    def gold(self, text: str) -> float:
        """Return the exact reward of a complete review, prompt included."""
        clauses = grammar.parse(text).clauses
        total = sum(c.weight * c.valence for c in clauses)
        if self.reward is Reward.sum or not clauses:
            return total
        return total / sum(c.weight for c in clauses)

    def well_formed(self, text: str) -> bool:
        """Return whether the text is in the grammar and has a permitted number of clauses."""
        review = grammar.parse(text)
        return review.well_formed and self.min_clauses <= len(review.clauses) <= self.max_clauses

    def _clauses(self, rng: random.Random) -> int:
        return rng.randint(self.min_clauses, self.max_clauses)
