"""Seeds by name: every random draw has a stream of its own, derived from the run's seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed for `name` (\"order\", \"samples\", ...); arms with one seed share every stream."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1
