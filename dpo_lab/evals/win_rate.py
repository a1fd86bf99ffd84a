"""Win rate: how often a judge prefers the trained policy's response to the initial policy's for the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.stats.estimates import Estimate, share, share_at_zero

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

PairwiseJudge = Callable[
    [str, str, str], float
]  # (prompt, first, second) -> 1 if first is better, 0 if second, 1/2: tie


@dataclass
class WinRate:
    """Share of prompts for which the trained policy's response is better, where a tie counts half: `win_rate` by gold
    reward, `judge_win_rate` by the judge's score, `pairwise_win_rate` by a judge that compares two responses, in both
    orders.

    `..._equal_length`: the length-controlled win rate, predicted at a length difference of 0 by a logistic regression
    of wins on the difference in tokens (after Dubois et al. 2024, arXiv:2404.04475, with one term); left out if the
    samples do not determine it.
    """

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        wins = {
            "win" if name == "gold" else f"{name}_win": (np.sign(trained - initial) + 1) / 2
            for name, (trained, initial) in context.rewards.items()
        }
        if context.pairwise is not None:
            trained, initial = context.responses(context.samples), context.responses(context.initial_samples)
            wins["pairwise_win"] = in_both_orders(context.pairwise, context.prompts, trained, initial)
        length_difference = np.array([len(s.tokens) for s in context.samples], np.float64)
        length_difference -= [len(s.tokens) for s in context.initial_samples]
        for name, won in wins.items():
            context.examples.keep("prompt", context.prompt_keys, **{name: won})
            yield f"{name}_rate", share(won)
            if (at_equal_length := share_at_zero(won, length_difference)) is not None:
                yield f"{name}_rate_equal_length", at_equal_length


def in_both_orders(
    judge: PairwiseJudge, prompts: Sequence[str], trained: Sequence[str], initial: Sequence[str]
) -> np.ndarray:
    """Return wins of the trained policy, [N], averaged over both orders, so that position bias cancels."""
    return np.array(
        [(judge(p, a, b) + 1 - judge(p, b, a)) / 2 for p, a, b in zip(prompts, trained, initial, strict=True)],
        np.float64,
    )
