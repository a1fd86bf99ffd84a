"""Pairs of rated responses: which of them are compared, and the reason where none are."""

from __future__ import annotations

from enum import Enum
from itertools import combinations

from dpo_lab.data.labels import NoPair

Rated = tuple[str, float]  # a response and its rating


class Pick(str, Enum):
    """How rated responses become pairs; among equal ratings the first is the best."""

    best_worst = "best_worst"  # the best against the worst: one pair per row
    best_rest = "best_rest"  # the best against each other one
    all = "all"  # all pairs with different ratings


def pairs_of(rated: list[Rated], pick: Pick) -> list[tuple[Rated, Rated]]:
    """Return pairs of a better and a worse response; raise NoPair if there are none."""
    if len(rated) < 2:
        raise NoPair("fewer than two responses")
    best = max(rated, key=lambda response: response[1])
    if pick is Pick.best_worst:
        pairs = [(best, min(rated, key=lambda response: response[1]))]
    elif pick is Pick.best_rest:
        pairs = [(best, other) for other in rated]
    else:
        pairs = [(a, b) if a[1] > b[1] else (b, a) for a, b in combinations(rated, 2)]
    ranked = [(better, worse) for better, worse in pairs if better[1] > worse[1]]
    distinct = [(better, worse) for better, worse in ranked if better[0] != worse[0]]
    if not distinct:
        raise NoPair("identical sides" if ranked else "tied ratings")
    return distinct
