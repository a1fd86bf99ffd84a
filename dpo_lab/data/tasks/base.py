"""The base class of tasks: where prompts come from, the gold reward of a text, and an annotator who labels by that
reward.

What a controlled experiment needs and real preference data lack:

- gold reward: what any text is worth, computed, so that gain is measured and not guessed.
- an annotator: of two responses takes `a` with probability sigma((gold(a) - gold(b)) / temperature), Bradley-Terry. The
  reward that DPO can recover is therefore gold / temperature, and its optimum is reference x exp(gold / (temperature beta)).
- splits that never overlap: a prompt or review belongs to a split by a hash of its text, whatever the seed.
- the truth beside every label: `Pair.gold_margin`, for evaluation only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp
from typing import ClassVar

from dpo_lab.core.pairs import Pair
from dpo_lab.core.seeds import derive_seed


class Rejected(str, Enum):
    """What a pair's rejected response is."""

    sampled = "sampled"  # the sample that the annotator did not take
    scrambled = "scrambled"  # that sample with its letters in random order: no text


@dataclass
class Task:
    """What all worlds share: the annotator's temperature and the length of the responses that it is shown.

    rejected: `scrambled` makes pairs that are too easy, to see what a run on them looks like: that one side is no text
    tells the label, whatever the reward. decides_form: whether `well_formed` can tell for any text whether it is a text
    of this world. whole: whether texts and responses are whole, each with an end of its own; else all are cut,
    responses at max_new_tokens, and end nowhere.
    """

    decides_form: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    temperature: float = 0.25
    max_new_tokens: int = 48
    rejected: Rejected = Rejected.sampled

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"data.world.temperature={self.temperature}: must be above 0; type e.g. data.world.temperature=0.25"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"data.world.max_new_tokens={self.max_new_tokens}: must be 1 or more;"
                " type e.g. data.world.max_new_tokens=48"
            )

    def check(self) -> None:
        """Raises BadData where something that the world is made from is missing."""

    def reviews(self, split: str, count: int, seed: int) -> list[str]:
        """`count` texts of a split."""
        raise NotImplementedError

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """`count` prompts of a split; a prompt may come more than once."""
        raise NotImplementedError

    def gold(self, text: str) -> float:
        """The reward of a whole text, prompt included."""
        raise NotImplementedError

    def well_formed(self, text: str) -> bool:
        """Whether a text is one of this world, where it decides that."""
        raise NotImplementedError

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

        sample(prompts, name) gives one response a prompt, None where it stopped by itself and should have been cut, or
        the other way round (`whole` says which); `name` names its stream of random numbers.
        """
        prompts = self.prompts(split, count, seed)
        firsts, seconds = sample(prompts, f"{split}/first"), sample(prompts, f"{split}/second")
        rng = random.Random(derive_seed(seed, f"world/annotator/{split}"))
        scrambling = random.Random(derive_seed(seed, f"world/scrambled/{split}"))
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            if first is None or second is None:
                yield "unfinished response" if self.whole else "response that stopped early"
            elif first == second:
                yield "identical sides"
            else:
                pair = self.label(prompt, first, second, rng)
                yield self._scrambled(pair, scrambling) if self.rejected is Rejected.scrambled else pair

    def _scrambled(self, pair: Pair, rng: random.Random) -> Pair:
        """The same with the letters of the rejected response, spaces and all but the first of them, in another order;
        its truth is about that.
        """
        prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
        letters = list(rejected[1:])
        rng.shuffle(letters)
        rejected = rejected[:1] + "".join(letters)
        return Pair(prompt, chosen, rejected, self.gold(prompt + chosen) - self.gold(prompt + rejected))


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))
