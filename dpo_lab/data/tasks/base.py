"""The base class of tasks: where prompts come from, the gold reward of a text, and an annotator who labels by that
reward.

A task provides what a controlled experiment needs and real preference data lack:

- gold reward: a reward that can be computed for any text, so that gains are measured.
- an annotator: prefers response `a` to `b` with probability sigma((gold(a) - gold(b)) / temperature), Bradley-Terry.
  The reward that DPO can recover is therefore gold / temperature; its optimum is reference x exp(gold / (temperature
  beta)).
- splits that never overlap: a hash of its text decides the split of a prompt or review, for all seeds.
- the true preference of every pair: `Pair.gold_margin`, for evaluation only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp
from typing import ClassVar

from dpo_lab.core.pairs import Pair
from dpo_lab.core.registry import add_to_table
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.splits import split_of

TASKS: dict[str, type[Task]] = {}  # by name in configs


class Rejected(str, Enum):
    """The rejected response of a pair."""

    sampled = "sampled"  # the sample that the annotator did not prefer
    scrambled = "scrambled"  # the same with its letters in random order


@dataclass
class Task:
    """The base class of tasks. temperature: the annotator's; max_new_tokens: the length limit of sampled responses.

    rejected: `scrambled` makes pairs that are too easy, to see how a run on such pairs looks: the label can be
    predicted without the reward, since rejected responses are not text.

    A subclass defines `texts`, `prompts` and `gold` and states its name in configs; has_grammar: whether it defines
    `well_formed`; complete_texts: whether texts and responses are complete, with an end token, otherwise all are
    truncated, responses at max_new_tokens, and have none.
    """

    has_grammar: ClassVar[bool]
    complete_texts: ClassVar[bool]
    temperature: float = 0.25
    max_new_tokens: int = 48
    rejected: Rejected = Rejected.sampled

    def __init_subclass__(cls, *, name: str, has_grammar: bool, complete_texts: bool) -> None:
        cls.has_grammar, cls.complete_texts = has_grammar, complete_texts
        add_to_table(TASKS, name, cls)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"data.task.temperature={self.temperature}: must be above 0; type e.g. data.task.temperature=0.25"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"data.task.max_new_tokens={self.max_new_tokens}: must be 1 or more;"
                " type e.g. data.task.max_new_tokens=48"
            )

    def check(self) -> None:
        """Raise BadData if something that the task is made from, such as a package, is missing."""

    def texts(self, split: str, count: int, seed: int) -> list[str]:
        """Return `count` texts of a split."""
        raise NotImplementedError

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """Return `count` prompts of a split; prompts may repeat."""
        raise NotImplementedError

    def gold(self, text: str) -> float:
        """Return the reward of a complete text, prompt included."""
        raise NotImplementedError

    def well_formed(self, text: str) -> bool:
        """Return whether a text is in the grammar of the task, if it has one."""
        raise NotImplementedError

    def draw(self, sample: Callable[[random.Random], str], split: str, count: int, seed: int, stream: str) -> list[str]:
        """Call `sample` until `count` texts belong to a split, and return them. stream: name of the random stream."""
        rng = random.Random(derive_seed(seed, f"world/{stream}/{split}"))
        texts: list[str] = []
        while len(texts) < count:
            if split_of(text := sample(rng)) == split:
                texts.append(text)
        return texts

    def label(self, prompt: str, first: str, second: str, rng: random.Random) -> Pair:
        """Return the pair that the annotator makes of two responses to a prompt."""
        difference = self.gold(prompt + first) - self.gold(prompt + second)
        if rng.random() < _sigmoid(difference / self.temperature):
            return Pair(prompt, first, second, difference)
        return Pair(prompt, second, first, -difference)

    def pairs(
        self, split: str, count: int, seed: int, sample: Callable[[Sequence[str], str], Sequence[str | None]]
    ) -> Iterator[Pair | str]:
        """Yield a labelled pair of two samples for each of `count` prompts, or the reason why it was dropped.

        sample(prompts, name) returns one response per prompt, None if it should have ended but was truncated or,
        where texts are not complete, if it ended; `name` is the name of its stream of random numbers.
        """
        prompts = self.prompts(split, count, seed)
        firsts, seconds = sample(prompts, f"{split}/first"), sample(prompts, f"{split}/second")
        rng = random.Random(derive_seed(seed, f"world/annotator/{split}"))
        scrambling = random.Random(derive_seed(seed, f"world/scrambled/{split}"))
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            if first is None or second is None:
                yield "unfinished response" if self.complete_texts else "response that stopped early"
            elif first == second:
                yield "identical sides"
            else:
                pair = self.label(prompt, first, second, rng)
                yield self._scrambled(pair, scrambling) if self.rejected is Rejected.scrambled else pair

    def _scrambled(self, pair: Pair, rng: random.Random) -> Pair:
        """Return the pair with the characters of the rejected response after the first shuffled, and its new gold
        margin.
        """
        prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
        letters = list(rejected[1:])
        rng.shuffle(letters)
        rejected = rejected[:1] + "".join(letters)
        return Pair(prompt, chosen, rejected, self.gold(prompt + chosen) - self.gold(prompt + rejected))


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))
