"""Accuracy on further preference files, by subset, beside scores that need no reference and the length of responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.core.pair_table import prompt_groups
from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, shares_of_known

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

PREFIX = "pairs/"
PARTS = {  # of a set's metrics
    "accuracy": "accuracy",
    "policy_accuracy": "  by likelihood per token",
    "longer": "  chosen is longer",
    "judge_accuracy": "  of the judge",
    "judge_first": "  judge prefers first shown",
    "judge_undecided": "  undecided by order",
    "judge_unanswered": "  judge gave no answer",
}


@dataclass
class PairSets(
    Evaluator, name="pair_sets", order=15, is_default=False, needs_samples=False, needs_reward=False, needs_pairs=False
):
    """Of each file of evals.pairs, as `pairs/NAME/METRIC`, and of each of its subsets, as `pairs/NAME/SUBSET/METRIC`: the
    share of pairs whose chosen response is preferred, a tie counts half. Intervals take pairs of one prompt as correlated.

    accuracy: by the log-ratio of trained to initial policy, the implicit reward; policy_accuracy: by the log-probability
    per token of the trained policy alone, under `initial/` of the initial one; longer: by the number of tokens, the
    accuracy of preferring length; judge_accuracy: by the judge, if one is set, with judge_first, judge_undecided
    and judge_unanswered as in win_rate. Runs whenever evals.pairs names a file.
    """

    labels = {}

    @classmethod
    def labels_for(cls, metrics: Iterable[str]) -> dict[str, str]:
        found = {}
        for metric in metrics:
            name, _, part = metric.removeprefix(PREFIX).rpartition("/")
            if metric.startswith(PREFIX) and part in PARTS:
                found[metric] = f"{name}: accuracy" if part == "accuracy" else PARTS[part]
        return found

    @classmethod
    def is_implied(cls, settings) -> bool:
        return bool(settings.pairs)

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        for name, pairs in context.pair_sets.items():
            scored = context.score([pair.encoded for pair in pairs])
            trained, initial = scored.trained, scored.initial
            margins = {
                "accuracy": scored.margins,
                "policy_accuracy": trained.per_token().margin,
                "initial/policy_accuracy": initial.per_token().margin,
                "longer": trained.chosen_length - trained.rejected_length,
            }
            columns = {metric: np.heaviside(np.asarray(each, np.float64), 0.5) for metric, each in margins.items()}
            if context.judge is not None:
                verdicts = context.judge.compare(*zip(*(pair.texts for pair in pairs), strict=True))
                columns |= {"judge_accuracy": verdicts.wins, **verdicts.by_order()}
            prompts = prompt_groups(pair.encoded for pair in pairs)
            subsets = np.array([pair.subset for pair in pairs])
            keys = [f"{name}/{pair.encoded.key}" for pair in pairs]
            context.examples.add("pair_set", keys, subset=subsets.tolist(), **columns)
            yield from _shares(f"{PREFIX}{name}", columns, prompts)
            names = dict.fromkeys(subsets.tolist())
            for subset in names if len(names) > 1 else ():
                rows = subsets == subset
                part = {metric: values[rows] for metric, values in columns.items()}
                yield from _shares(f"{PREFIX}{name}/{subset or 'others'}", part, prompts[rows])


def _shares(name: str, columns: dict[str, np.ndarray], prompts: np.ndarray) -> Iterator[tuple[str, Estimate]]:
    for metric, estimate in shares_of_known(columns, prompts):
        initial = "initial/" if metric.startswith("initial/") else ""
        yield f"{initial}{name}/{metric.removeprefix(initial)}", estimate
