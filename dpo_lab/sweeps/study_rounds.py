"""Rounds of a study that adds seeds until it is decided: which seeds and arms come next, and a look at the verdicts after
each seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_lab.reporting.comparison import effect_text
from dpo_lab.runs.run_record import now
from dpo_lab.stats.paired_tests import INCONCLUSIVE, NOT_SUPPORTED, Verdict
from dpo_lab.studies import sequential
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.seed_effects import arms_of, seed_effects
from dpo_lab.studies.spec import Prediction, Study
from dpo_lab.studies.verdicts import decide

DECIDED = "decided"
FEWEST = 5  # seeds: the Bayes factor of four paired effects is at most 11.2, and an error rate of 5 % needs 20
MAX_SEEDS = 24


def stopping(first: Sequence[int], max_seeds: int) -> dict[str, Any]:
    """Return the stopping rule as it is registered before the first run. first: the seeds to begin with.

    `all_arms`: seeds that every arm has; further ones have those of `arms_left`.
    """
    begun = seeds_in_order(first, max_seeds)[: len(first)]
    return {"until": DECIDED, "max_seeds": max_seeds, "seeds": begun, "all_arms": max(FEWEST, len(begun))}


def seeds_in_order(first: Sequence[int], number: int) -> list[int]:
    """Return `number` seeds: those of `first`, then the whole numbers after the largest of them."""
    return list(itertools.islice(itertools.chain(first, itertools.count(max(first) + 1)), number))


def seeds_a_round(arms: int, workers: int) -> int:
    """Return how many seeds a round adds: one, or as many as give every worker a job. arms: of all studies left."""
    return max(1, math.ceil(workers / max(1, arms)))


def arms_left(study: Study, judged: Sequence[tuple[Prediction, Verdict]]) -> set[str]:
    """Return the names of the arms of primary predictions that are undecided, with the baseline, on which the optimum's
    line is measured; none if all are decided.
    """
    undecided = [p for p, verdict in judged if p.primary and verdict.word == INCONCLUSIVE]
    return {study.baseline}.union(*(arms_of(p, study) for p in undecided)) if undecided else set()


def looks(collection: RunSet, earlier: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return a look after every seed, in the order in which seeds were added; those of `earlier` are kept."""
    seeds = collection.seeds
    made = [_look(_first(collection, number)) for number in range(len(earlier) + 1, len(seeds) + 1)]
    return [*map(dict, earlier), *made]


def is_decided(judged: Sequence[tuple[Prediction, Verdict]]) -> bool:
    """Return whether every primary prediction has a verdict other than inconclusive."""
    return all(verdict.word != INCONCLUSIVE for prediction, verdict in judged if prediction.primary)


def lines(judged: Sequence[tuple[Prediction, Verdict]]) -> list[str]:
    """Return a line for each prediction: its verdict, the effect with its interval, and how many seeds have it."""
    return [
        f"{verdict.word:{len(NOT_SUPPORTED)}}  {prediction.description}{'' if prediction.primary else ' (secondary)'}: "
        + (
            f"{effect_text(verdict.effect, prediction.scale)}, {len(verdict.seeds)} seeds"
            if verdict.effect
            else "not measured"
        )
        for prediction, verdict in judged
    ]


def _first(collection: RunSet, number: int) -> RunSet:
    """Return the runs of the first `number` seeds."""
    seeds = collection.seeds[:number]
    return replace(collection, seeds=seeds, runs=[run for run in collection.runs if run.seed in seeds])


def _look(collection: RunSet) -> dict[str, Any]:
    """Return what one look at the runs said: of each prediction the effect, its interval, e value, p and verdict."""
    entries = []
    for prediction, verdict in decide(collection):
        of, effect = seed_effects(prediction, collection), verdict.effect
        effects = [*of.effects.values()]
        if of.is_yes_no and effects:
            occurred = [value + prediction.value for value in effects]
            e = math.exp(float(sequential.share_log_e_values(occurred, prediction.value)[-1]))
        else:
            e = sequential.e_value(effects, 0.0)
        entries.append(
            {
                "prediction": prediction.description,
                "n": len(effects),
                "effect": _finite(effect.value) if effect else None,
                "interval": [_finite(end) for end in effect.interval] if effect and effect.interval else None,
                "e": _finite(e),
                "p": verdict.p,
                "p_holm": verdict.p_holm,
                "verdict": verdict.word,
            }
        )
    return {"seeds": len(collection.seeds), "at": now(), "predictions": entries}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
