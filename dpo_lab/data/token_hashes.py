"""Hashes of the token ids of prompts and responses, to find equal ones among millions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dpo_lab.core.pair_table import PairTable

BLOCK = 1 << 18  # tokens to process at once, which fit into the cache of a core


def pass_over(table: PairTable, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 64-bit hashes of the three parts of each pair, and the number of special tokens in each part, both [N, 3].

    A hash is the sum over tokens of a random number of the token id times a random odd number of the position.
    """
    vocabulary, longest = 1 + max(int(table.tokens.max()), int(special.max(initial=0))), int(table.lengths.max())
    of_token = scrambled(np.arange(vocabulary, dtype=np.uint64))
    of_position = scrambled(np.arange(longest, dtype=np.uint64) + np.uint64(1 << 40)) | np.uint64(1)
    is_special = np.zeros(vocabulary, np.int64)
    is_special[special] = 1
    lengths = table.lengths.astype(np.int64)
    hashes, specials = np.zeros(lengths.shape, np.uint64), np.zeros(lengths.shape, np.int64)
    block_of = np.cumsum(table.sizes, dtype=np.int64) // BLOCK
    borders = [0, *(np.flatnonzero(np.diff(block_of)) + 1).tolist(), len(table)]
    for first, end in pairwise(borders):
        block = lengths[first:end].ravel()
        sizes = lengths[first:end].sum(1)
        starts = np.cumsum(block) - block  # start of each part in the block
        row = np.arange(int(sizes.sum()))
        ids = table.tokens[row + np.repeat(table.starts[first:end] - starts[::3], sizes)]
        position = row - np.repeat(starts, block)
        is_filled = block > 0  # reduceat does not return 0 for an empty part
        for out, values in ((hashes, of_token[ids] * of_position[position]), (specials, is_special[ids])):
            out[first:end].reshape(-1)[is_filled] = np.add.reduceat(values, starts[is_filled])
    return hashes, specials


def scrambled(numbers: np.ndarray) -> np.ndarray:
    """Map 64-bit numbers to pseudo-random ones (splitmix64: Steele, Lea and Flood 2014)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mixed(prompt: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Combine three hashes; the result depends on their order."""
    return scrambled(scrambled(scrambled(prompt) ^ first) ^ second)


def counts_of_equal(hashes: np.ndarray) -> np.ndarray:
    """Return the count of each distinct value, by sorting, which takes a tenth of the time of np.unique."""
    ordered = np.sort(hashes)
    return np.diff(np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]))
