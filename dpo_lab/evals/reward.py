"""Gold reward of samples, where the world knows it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lab.evals.subject import Subject
from dpo_lab.results.estimates import Estimate, mean, share


@dataclass
class GoldReward:
    """Mean gold reward of the trained and of the initial policy's samples, and how often the trained one's is higher.

    gold_gain is their difference in standard deviations of the initial policy's samples, prompt by prompt.
    """

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        if subject.world is None:
            return
        trained = [subject.world.gold(text) for text in subject.reviews(subject.samples)]
        initial = [subject.world.gold(text) for text in subject.reviews(subject.initial_samples)]
        yield "gold", mean(trained)
        yield "initial/gold", mean(initial)
        if sd := statistics.pstdev(initial):
            yield "gold_gain", mean([(t - i) / sd for t, i in zip(trained, initial, strict=True)])
        yield "win_rate", share([(t > i) + (t == i) / 2 for t, i in zip(trained, initial, strict=True)])
