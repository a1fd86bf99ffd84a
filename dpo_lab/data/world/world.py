"""The embedded world: short reviews, whose reward is exact and whose grammar is decidable.

A world for controlled experiments that fits a laptop. `grammar.py` writes reviews of an exact number of clauses and parses
any text; this module adds what an experiment needs:

- gold reward: the weighted mean of the clauses' valences, so that length buys nothing (`reward=sum` lets it be bought, to
  study length exploitation). What is no clause counts as a clause worth 0. A review of three clauses has a gold reward of
  mean 0 and standard deviation 1.
- an annotator: of two responses takes `a` with probability sigma((gold(a) - gold(b)) / temperature), Bradley-Terry. The
  reward that DPO can recover is therefore gold / temperature, and its optimum is reference x exp(gold / (temperature
  beta)). The default temperature is chosen so that at beta 0.1 a run ends far above its start with its language intact.
- splits that never overlap: a prompt or review belongs to a split by a hash of its text, whatever the seed.
- the truth beside every label: `Pair.gold_margin`, for evaluation only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp

from dpo_lab.core.pairs import Pair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.world import grammar


class Reward(str, Enum):
    """How clause valences become one reward."""

    mean = "mean"
    sum = "sum"


TRAIN, HELD_OUT = "train", "held-out"  # the two splits


@dataclass
class World:
    """Settings of the embedded world: its shape, its reward and its annotator."""

    min_clauses: int = 3
    max_clauses: int = 3
    reward: Reward = Reward.mean
    temperature: float = 0.25
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        if not 1 <= self.min_clauses <= self.max_clauses:
            raise ValueError(
                f"data.world.min_clauses={self.min_clauses}, max_clauses={self.max_clauses}: need"
                " 1 <= min <= max; type e.g. data.world.min_clauses=1 data.world.max_clauses=6"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"data.world.temperature={self.temperature}: must be above 0; type e.g. data.world.temperature=0.25"
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

    def label(self, prompt: str, first: str, second: str, rng: random.Random) -> Pair:
        """The annotator's verdict on two responses to a prompt."""
        difference = self.gold(prompt + first) - self.gold(prompt + second)
        if rng.random() < _sigmoid(difference / self.temperature):
            return Pair(prompt, first, second, difference)
        return Pair(prompt, second, first, -difference)

    def pairs(
        self, split: str, count: int, seed: int, sample: Callable[[Sequence[str], str], Sequence[str | None]]
    ) -> Iterator[Pair | str]:
        """Labelled pairs of two samples for each of `count` prompts, or the reason why a pair was dropped.

        sample(prompts, name) gives one response a prompt, None where it did not stop by itself; `name` names its stream
        of random numbers.
        """
        prompts = self.prompts(split, count, seed)
        firsts, seconds = sample(prompts, f"{split}/first"), sample(prompts, f"{split}/second")
        rng = random.Random(derive_seed(seed, f"world/annotator/{split}"))
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            if first is None or second is None:
                yield "unfinished response"
            elif first == second:
                yield "identical sides"
            else:
                yield self.label(prompt, first, second, rng)

    def _of_split(self, draw: Callable, split: str, count: int, seed: int, kind: str) -> list[str]:
        rng = random.Random(derive_seed(seed, f"world/{kind}/{split}"))
        texts: list[str] = []
        while len(texts) < count:
            text = draw(rng, rng.randint(self.min_clauses, self.max_clauses))
            if split_of(text) == split:
                texts.append(text)
        return texts


def split_of(text: str, held_out_share: float = 0.2) -> str:
    """The split that a text belongs to, by a hash of it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()
    return HELD_OUT if int.from_bytes(digest, "big") < held_out_share * 2.0**64 else TRAIN


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))
