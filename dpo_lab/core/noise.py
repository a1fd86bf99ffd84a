"""Label noise in the world: which pairs an annotator labelled the wrong way round."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass
class LabelNoise:
    """Symmetric label noise, a function of (seed, pair key) alone.

    A pair is flipped iff hash(seed, key) / 2^64 < rate. So the flipped set depends on no order, worker, rank or subset,
    and the set at a lower rate lies inside the set at a higher one.
    """

    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"noise.rate={self.rate}: must lie in [0, 1]; type e.g. noise.rate=0.2")

    def flips(self, key: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8, person=b"label noise").digest()
        return int.from_bytes(digest, "big") < self.rate * 2.0**64
