"""Which seeds of a study give a prediction an effect, which have none, and what a missing one counts as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lab.studies.effects import effect_per_seed
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import is_yes_no
from dpo_lab.studies.spec import Direction, Measure, Prediction, Study

OVER = ("done", "failed", "unreadable")  # run statuses that will not change without a new start


@dataclass(frozen=True)
class SeedEffects:
    """The effects of a prediction by seed. seeds: all that are looked at, in order; missing: seed -> why it has none;
    going: those of the missing seeds whose runs have not all ended; is_yes_no: an effect is 0 or 1, minus a value.
    """

    seeds: Sequence[int]
    effects: Mapping[int, float]
    missing: Mapping[int, str]
    going: Sequence[int]
    is_anytime: bool
    is_yes_no: bool

    @property
    def absent(self) -> list[int]:
        """The seeds without an effect whose runs have ended."""
        return [seed for seed in self.missing if seed not in self.going]

    def filled(self, prediction: Prediction, side: int) -> list[float]:
        """Return the effects in the order of seeds, with the absent ones (unless side is 0) as large as the largest found,
        against the prediction (-1) or in its favour (1). Against `same` they are at least twice its margin, on either side.
        """
        if not side:
            return list(self.effects.values())
        size = max(map(abs, self.effects.values()), default=0.0)
        sign = -side if prediction.direction is Direction.less else side
        value = sign * (max(size, 2 * prediction.least) if prediction.direction is Direction.same else size)
        if self.is_yes_no:
            value = float(sign > 0) - prediction.value
        return [self.effects.get(seed, value) for seed in self.seeds if seed not in self.going]


def arms_of(prediction: Prediction, collection: RunSet | Study) -> set[str]:
    """Return the names of the arms that a prediction is about."""
    return {
        arm.name for named in (prediction.treatment, prediction.control) if named for arm in collection.members(named)
    }


def is_anytime(record: Mapping[str, Any]) -> bool:
    """Return whether a study's record says that seeds were added until it was decided."""
    return bool((record.get("stopping") or {}).get("until"))


def seed_effects(prediction: Prediction, collection: RunSet) -> SeedEffects:
    """Return the effects of a prediction by seed, and which seeds have none.

    Where seeds are added until the study is decided, those from the first on are left out whose runs have not all ended,
    since which of several runs ends first must not matter, or do not all exist, since arms stop with their predictions.
    """
    effects, missing = effect_per_seed(prediction, collection)
    named = arms_of(prediction, collection)
    going = {run.seed for run in collection.runs if run.seed in missing and run.arm in named and run.status not in OVER}
    anytime = is_anytime(collection.record)
    if anytime:
        known = Counter(run.seed for run in collection.runs if run.arm in named)
        going |= {seed for seed in collection.seeds if known[seed] < len(named)}
    if anytime and going:
        looked = collection.seeds[: min(map(list(collection.seeds).index, going))]
        effects = {seed: effect for seed, effect in effects.items() if seed in looked}
        missing = {seed: why for seed, why in missing.items() if seed in looked}
        going = set()
    is_level = prediction.measure is Measure.level and len(collection.members(prediction.treatment)) == 1
    seeds = [seed for seed in collection.seeds if seed in effects or seed in missing]
    return SeedEffects(seeds, effects, missing, sorted(going), anytime, is_level and is_yes_no(prediction.metric))
