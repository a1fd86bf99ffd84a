"""Split pairs into training and held-out by a hash of the prompt, so that no prompt is in both."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from dpo_lab.core.pairs import Text

TRAIN, HELD_OUT = "train", "held-out"  # the two splits


def split_hash(prompt: Text) -> int:
    """Return the 64-bit hash of a prompt or text that decides its split."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, person=b"split")
    return int.from_bytes(digest.digest(), "big")


def split_of(text: str, held_out_share: float = 0.2) -> str:
    """Return the split of a text."""
    return HELD_OUT if split_hash(text) < held_out_share * 2.0**64 else TRAIN


def hash_draws(keys: np.ndarray, name: str) -> np.ndarray:
    """Return a 64-bit hash of each pair key and `name`, to select a random subset of pairs by a threshold.

    A smaller threshold selects a subset of a larger one; different names give independent subsets.
    """
    salt = f"lots/{name}".encode()
    hashes = (int.from_bytes(hashlib.blake2b(salt + key, digest_size=8).digest(), "big") for key in keys)
    return np.fromiter(hashes, np.uint64, len(keys))


def below_fraction(hashes: np.ndarray, part: float) -> np.ndarray:
    """Return which 64-bit hashes are below the fraction `part` of their range, [N] bool."""
    return np.ones(len(hashes), bool) if part >= 1 else hashes < np.uint64(part * 2.0**64)
