"""Seeds by name: every random draw has a stream of its own, derived from the run's seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, name: str) -> int:
    """Derive a 63-bit seed for `name` ("order", "samples", ...); arms with the same seed share all streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1
