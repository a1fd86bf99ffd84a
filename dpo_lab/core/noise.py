"""Label noise: which training pairs get chosen and rejected swapped."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.registry import add_to_table

NOISES: dict[str, type[LabelNoise]] = {}  # by name in configs


@dataclass
class LabelNoise:
    """The base class of label noise: pair i is flipped iff hash(seed, key of the pair) / 2^64 < rates[i].

    So which pairs are flipped does not depend on order, worker, rank or subset, and pairs flipped at a lower rate are
    also flipped at a higher one. A subclass defines `rates`; name: its name in configs; compares: whether its rates
    compare the responses of a pair, so that it takes no responses that were labelled on their own.
    """

    compares: ClassVar[bool]
    seed: int = 0

    def __init_subclass__(cls, *, name: str, compares: bool = False) -> None:
        cls.compares = compares
        add_to_table(NOISES, name, cls)

    @property
    def is_none(self) -> bool:
        """Whether this is noise=none."""
        return self == Symmetric(seed=self.seed)

    @property
    def needs_reference(self) -> bool:
        """Whether `rates` needs `reference_margins`."""
        return False

    def rates(self, pairs: PairTable, reference_margins: np.ndarray | None = None) -> np.ndarray:
        """Return the probability that each pair is flipped, [N].

        reference_margins [N]: log-probability of chosen minus that of rejected under the initial policy, nats.
        """
        raise NotImplementedError

    def flips(self, pairs: PairTable, reference_margins: np.ndarray | None = None) -> np.ndarray:
        """Return which pairs are flipped, [N] bool. Raises ValueError if a rate is unknown."""
        if self.compares and (single := int(pairs.is_one_sided.sum())):
            raise ValueError(
                f"noise: this kind compares the two responses of a pair, and {single:,} of {len(pairs):,} training rows have"
                " one; type noise=symmetric"
            )
        rates = self.rates(pairs, reference_margins).tolist()
        return np.array(
            [rate > 0 and self._draw(key) < rate * 2.0**64 for key, rate in zip(pairs.keys, rates, strict=True)], bool
        )

    def _draw(self, key: bytes) -> int:
        digest = hashlib.blake2b(b"%d/%s" % (self.seed, key), digest_size=8, person=b"label noise").digest()
        return int.from_bytes(digest, "big")


@dataclass
class Symmetric(LabelNoise, name="symmetric"):
    """Symmetric noise: every pair is flipped with the same probability."""

    rate: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def rates(self, pairs, reference_margins=None) -> np.ndarray:
        return np.full(len(pairs), self.rate)


class Gap(str, Enum):
    """How the gap between the two responses of a pair is measured."""

    scores = "scores"  # the gold reward of the task, else the scores that came with the pairs
    reference = "reference"  # the initial policy's log-probabilities, nats


@dataclass
class Uncertainty(LabelNoise, name="uncertainty", compares=True):
    """Noise on hard pairs: a pair is flipped with probability sigma(-|gap| / temperature).

    This is the probability of preferring the worse of two responses in the model of Bradley and Terry (1952): 1/2 at a
    gap of 0, towards 0 at large gaps.
    """

    temperature: float = 0.25
    gap: Gap = Gap.scores

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"noise.temperature={self.temperature}: must be above 0, on the scale of the gaps;"
                " type e.g. noise.temperature=0.25"
            )

    @property
    def needs_reference(self) -> bool:
        return self.gap is Gap.reference

    def rates(self, pairs, reference_margins=None) -> np.ndarray:
        if self.gap is Gap.reference:
            assert reference_margins is not None
            gaps = np.abs(reference_margins)
        else:
            gaps = np.abs(pairs.score_gap.astype(np.float64))
        if missing := int(np.isnan(gaps).sum()):
            raise ValueError(
                f"noise=uncertainty: {missing:,} of {len(gaps):,} pairs came without scores, so their gaps are unknown;"
                " type noise.gap=reference, or name the columns of the scores in data.columns"
            )
        return 1 / (1 + np.exp(np.minimum(gaps / self.temperature, 700)))


class Side(str, Enum):
    """The pairs that one-sided noise may flip."""

    chosen_shorter = "chosen_shorter"
    chosen_longer = "chosen_longer"


@dataclass
class OneSided(LabelNoise, name="one_sided", compares=True):
    """Noise with a length bias: pairs whose chosen response is the shorter (or longer) one in tokens are flipped at
    `rate`.
    """

    rate: float = 0.2
    side: Side = Side.chosen_shorter

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def rates(self, pairs, reference_margins=None) -> np.ndarray:
        _, chosen, rejected = pairs.lengths.T
        return np.where(chosen < rejected if self.side is Side.chosen_shorter else chosen > rejected, self.rate, 0.0)


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"noise.rate={rate}: must lie in [0, 1]; type e.g. noise.rate=0.2")
