"""Shares and means over pairs of which several may have the same prompt, and are then not independent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.stats.estimates import Estimate, mean, ratio, share, share_in_groups


def prompts_of(pairs: Iterable[EncodedPair]) -> np.ndarray:
    """Return the index of each pair's prompt among the distinct ones, [N]."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(np.asarray(p.prompt, np.int64).tobytes(), len(seen)) for p in pairs], np.int64)


def share_by_prompt(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Return the share over values in [0, 1] [N] with the interval of share_in_groups; prompts [N]: index of each prompt.

    The same as `share` if every value has a prompt of its own, or all have the same one.
    """
    groups, counts = _groups(prompts)
    return share(values) if len(counts) in (1, len(values)) else share_in_groups(values, groups)


def mean_by_prompt(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Return the mean of values [N], with the standard error of `ratio` over prompts; for prompts see share_by_prompt."""
    groups, counts = _groups(prompts)
    if len(counts) in (1, len(values)):
        return mean(values)
    return replace(ratio(np.bincount(groups, values), counts.tolist()), n=len(values))


def _groups(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, groups, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return groups, counts
