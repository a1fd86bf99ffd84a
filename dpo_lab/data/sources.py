"""Where pairs come from, and which of them train: the embedded world by default, a file where `path` names one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpo_lab.core.pairs import Pair
from dpo_lab.data.jsonl import OnBadRow, read_pairs
from dpo_lab.data.world.embedded import Embedded
from dpo_lab.data.world.imdb import Imdb
from dpo_lab.data.world.world import HELD_OUT, TRAIN, World, split_of

WORLDS: dict[str, type[World]] = {"embedded": Embedded, "imdb": Imdb}

Sampler = Callable[[Sequence[str], str], Sequence[str | None]]


@dataclass
class PairSplits:
    """Train and held-out pairs of text, and what became of the rows that are not among them."""

    train: list[Pair]
    held_out: list[Pair]
    counts: Counter[str]


@dataclass
class Data:
    """Settings of the pairs and of how they are fed.

    path: a JSONL file of {"prompt", "chosen", "rejected"}; none: the embedded world. batch_size: pairs an optimizer step,
    over all devices; tokens_per_microbatch: at most so many go through the model at once (a pair of more tokens goes alone),
    in training and wherever else its log-probabilities are computed: memory depends on it, results do not.
    """

    path: str | None = None
    on_bad_row: OnBadRow = OnBadRow.error
    validation_fraction: float = 0.1
    pairs: int = 4000
    validation_pairs: int = 512
    max_length: int = 512
    max_prompt_length: int = 256
    batch_size: int = 32
    tokens_per_microbatch: int = 2048
    num_workers: int = 0
    world: World = field(default_factory=Embedded)

    def __post_init__(self) -> None:
        if self.path == "":
            raise ValueError("data.path is empty; type data.path=FILE.jsonl, or data=world for the embedded world")
        for name in ("pairs", "validation_pairs", "batch_size", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be 1 or more; type e.g. data.{name}=32")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must be 0 or more; type e.g. data.num_workers=0")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1;"
                " type e.g. data.validation_fraction=0.1"
            )
        if not 2 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length}: must lie between 2 and"
                f" data.max_length={self.max_length}, so that responses have room;"
                " type e.g. data.max_length=512 data.max_prompt_length=256"
            )

    @property
    def is_world(self) -> bool:
        """Whether the pairs come from the embedded world, where the truth is known."""
        return self.path is None

    def load(self, seed: int, sample: Sampler) -> PairSplits:
        """All pairs, split by prompt, so that no prompt stands on both sides.

        sample: the world's source of responses, see World.pairs.
        """
        splits = self._from_world(seed, sample) if self.is_world else self._from_file()
        for name, pairs in (("train", splits.train), ("held-out", splits.held_out)):
            splits.counts[f"{name} pairs"] = len(pairs)
            if not pairs:
                raise ValueError(
                    f"{self.path or 'the embedded world'}: no {name} pair is left of {dict(splits.counts)}"
                )
        return splits

    def _from_world(self, seed: int, sample: Sampler) -> PairSplits:
        counts: Counter[str] = Counter()
        splits: dict[str, list[Pair]] = {}
        for split, count in ((TRAIN, self.pairs), (HELD_OUT, self.validation_pairs)):
            drawn = {}
            for item in self.world.pairs(split, count, seed, sample):
                counts["rows"] += 1
                if isinstance(item, str):
                    counts[f"dropped: {item}"] += 1
                elif item.key in drawn:
                    counts["dropped: duplicate"] += 1
                else:
                    drawn[item.key] = item
            splits[split] = list(drawn.values())
        return PairSplits(splits[TRAIN], splits[HELD_OUT], counts)

    def _from_file(self) -> PairSplits:
        counts: Counter[str] = Counter()
        splits: dict[str, list[Pair]] = {TRAIN: [], HELD_OUT: []}
        for pair in read_pairs(Path(str(self.path)), self.on_bad_row, counts):
            splits[split_of(pair.prompt, self.validation_fraction)].append(pair)
        return PairSplits(splits[TRAIN], splits[HELD_OUT], counts)
