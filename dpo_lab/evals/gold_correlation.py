"""Gold correlation: does the implicit reward order held-out pairs as the true reward does?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lab.core.metrics import settle
from dpo_lab.evals.subject import Subject
from dpo_lab.results.estimates import Estimate, rank_correlation


@dataclass
class GoldCorrelation:
    """Spearman's rank correlation of the implicit reward, chosen less rejected, with the gold one, over held-out pairs.

    The implicit reward is beta times the log-ratio to the initial policy; a positive beta changes no rank, so it is left
    out. Nothing where no truth is known, or where all pairs are alike in one of the two.
    """

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        trained, initial = subject.pair_logps
        margins = settle((trained - initial).margin, trained, initial).tolist()
        gold = [float(pair.gold_margin) for pair in subject.pairs]
        known = [(margin, truth) for margin, truth in zip(margins, gold, strict=True) if not math.isnan(truth)]
        if (correlation := rank_correlation(*zip(*known, strict=True)) if known else None) is not None:
            yield "gold_rank_correlation", correlation
