"""Preference accuracy: whether the trained policy, against the initial one, ranks pairs as their labels and the truth
do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean_by_group, rank_correlation, share_by_group

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.evals.scored_pairs import ScoredPairs


@dataclass
class Preference(Evaluator, name="preference", order=10, is_default=True, needs_samples=False, needs_reward=False):
    """Accuracy (a tie counts half), share of ties and log-ratio margin on held-out pairs; `true_accuracy` is the
    accuracy against the gold reward, `gold_correlation` the rank correlation of margins with gold margins.

    The same on a sample of the training pairs, under `train/`, for clean and flipped pairs separately. Both are
    measured with the labels they were trained on, so a high `train/flipped/accuracy` means that label noise was
    memorised.

    Responses labelled on their own have no accuracy. `auc` is the share of pairs of a desirable and an undesirable
    held-out response, of any prompts, where the desirable one has the larger log-ratio; a tie counts half.

    Intervals of shares and means take pairs of one prompt as correlated; that of gold_correlation does not.
    """

    labels = {
        "true_accuracy": "accuracy, truth (held-out)",
        "accuracy": "accuracy, labels (held-out)",
        "auc": "AUC, unpaired (held-out)",
        "margin": "log-ratio margin (nats)",
        "gold_correlation": "rank correlation with gold",
        "train/clean/accuracy": "accuracy, clean (train)",
        "train/flipped/accuracy": "accuracy, flipped (train)",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if len(held_out := context.held_out):
            yield from self._held_out(context, held_out)
        if len(held_out) < len(rows := context.held_out_rows):
            yield from _of_single_responses(context, rows)
        if not len(context.train_pairs) or not len(train := context.train):
            return
        context.examples.add("train", train.keys, **train.columns())
        for group, rows in (("clean", ~train.flipped), ("flipped", train.flipped)):
            if rows.any():
                right = np.heaviside(train.margins[rows], 0.5)
                yield f"train/{group}/accuracy", share_by_group(right, train.prompts[rows])
                yield f"train/{group}/margin", mean_by_group(train.margins[rows], train.prompts[rows])
        yield from _by_truth(train, "train/")

    def _held_out(self, context: EvalContext, held_out: ScoredPairs) -> Iterator[tuple[str, Estimate]]:
        context.examples.add("held_out", held_out.keys, **held_out.columns())
        yield "accuracy", share_by_group(np.heaviside(held_out.margins, 0.5), held_out.prompts)
        yield "ties", share_by_group(held_out.margins == 0, held_out.prompts)
        yield "margin", mean_by_group(held_out.margins, held_out.prompts)
        yield from _by_truth(held_out, "")
        known = ~np.isnan(held_out.gold)
        if correlation := rank_correlation(held_out.margins[known].tolist(), held_out.gold[known].tolist()):
            yield "gold_correlation", correlation


def _of_single_responses(context: EvalContext, rows: ScoredPairs) -> Iterator[tuple[str, Estimate]]:
    from scipy.stats import mannwhitneyu

    trained, initial = (logps.chosen.double() + logps.rejected for logps in (rows.trained, rows.initial))
    is_desirable, is_undesirable = rows.trained.rejected_length == 0, rows.trained.chosen_length == 0
    tokens = rows.trained.chosen_length + rows.trained.rejected_length
    columns = {"desirable": is_desirable, "trained": trained, "initial": initial, "tokens": tokens}
    single = (is_desirable | is_undesirable).tolist()
    keys = list(compress(rows.keys, single))
    context.examples.add("response", keys, **{name: column[single] for name, column in columns.items()})
    ratios = (trained - initial).numpy()
    desirable, undesirable = ratios[is_desirable], ratios[is_undesirable]
    if count := len(desirable) * len(undesirable):
        auc = float(mannwhitneyu(desirable, undesirable).statistic) / count
        yield "auc", Estimate(auc, n=len(desirable) + len(undesirable))


def _by_truth(scored: ScoredPairs, prefix: str) -> Iterator[tuple[str, Estimate]]:
    truth = np.sign(np.nan_to_num(scored.gold))
    if (known := truth != 0).any():
        right = np.heaviside(scored.margins * truth, 0.5)[known]
        yield prefix + "true_accuracy", share_by_group(right, scored.prompts[known])
