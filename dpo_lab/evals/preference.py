"""Preference: does the trained policy, against the initial one, rank held-out pairs as the labels and as the truth do?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dpo_lab.core.metrics import half_ties, settle
from dpo_lab.evals.subject import Subject
from dpo_lab.results.estimates import Estimate, mean, share


@dataclass
class Preference:
    """Accuracy and log-ratio margin on held-out pairs; `true_accuracy` against the side with more gold reward."""

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        trained, initial = subject.pair_logps
        ratios = trained - initial
        margins = settle(ratios.margin, trained, initial)
        yield "accuracy", share(half_ties(margins).tolist())
        yield "margin", mean(margins.tolist())
        yield "chosen_fell", share((ratios.chosen < 0).double().tolist())
        gold = torch.tensor([p.gold_margin for p in subject.pairs]).nan_to_num(0)
        if (known := gold != 0).any():
            yield "true_accuracy", share(half_ties(margins * gold.sign())[known].tolist())
