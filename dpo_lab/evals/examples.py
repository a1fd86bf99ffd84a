"""Single pairs, as the trained and the initial policy see them: all that are held out, and some that were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dpo_lab.core.metrics import settle
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.core.table import PairTable
from dpo_lab.evals.subject import Subject
from dpo_lab.results.examples import PairExample

TRAIN_SAMPLE = 512  # pairs: a share is known to about 4 %


def train_sample(train: PairTable, count: int = TRAIN_SAMPLE) -> PairTable:
    """`count` of the training pairs, or all; keys are hashes, so those of the smallest keys are a random sample, and the
    same one whatever the noise, the order or the number of pairs beside them.
    """
    return train.select(np.argsort(train.keys, kind="stable")[:count])


def pair_examples(subject: Subject, train: Sequence[EncodedPair]) -> list[PairExample]:
    """Every held-out pair and every pair of `train`. All ranks have to call it, see Subject."""
    held_out = _examples("held-out", subject.pairs, *subject.pair_logps)
    return [*held_out, *(_examples("train", train, *subject.logps_of(train)) if len(train) else ())]


def _examples(
    split: str, pairs: Sequence[EncodedPair], trained: PairLogps, initial: PairLogps
) -> Iterator[PairExample]:
    ratios = trained - initial
    columns = (
        settle(ratios.margin, trained, initial),
        ratios.chosen,
        ratios.rejected,
        trained.chosen,
        trained.rejected,
        trained.chosen_length,
        trained.rejected_length,
    )
    for pair, values in zip(pairs, zip(*(column.tolist() for column in columns), strict=True), strict=True):
        gold = float(pair.gold_margin)
        yield PairExample(pair.key, split, bool(pair.flipped), None if np.isnan(gold) else gold, *values)
