"""Win rate: how often a judge prefers the trained policy's response to the initial policy's for the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.stats.estimates import Estimate, share, share_at_zero

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

PairwiseJudge = Callable[[str, str, str], float]  # (prompt, first, second): 1 first is better, 0 second is, 1/2 a tie


@dataclass
class WinRate:
    """Share of prompts whose trained response is worth more, a tie counts half: `win_rate` by gold reward,
    `judge_win_rate` by a judge's score, `pairwise_win_rate` by a judge who compares two responses, asked in both orders.

    `..._equal_length`: the same at equal length, the share that a logistic regression of wins on the difference in tokens
    puts at a difference of 0 (after Dubois et al. 2024, arXiv:2404.04475, of one term); left out where the samples do not
    determine it.
    """

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        wins = {
            "win" if name == "gold" else f"{name}_win": (np.sign(trained - initial) + 1) / 2
            for name, (trained, initial) in subject.rewards.items()
        }
        if subject.pairwise is not None:
            trained, initial = subject.responses(subject.samples), subject.responses(subject.initial_samples)
            wins["pairwise_win"] = in_both_orders(subject.pairwise, subject.prompts, trained, initial)
        longer = np.array([len(s.tokens) for s in subject.samples], np.float64)
        longer -= [len(s.tokens) for s in subject.initial_samples]
        for name, won in wins.items():
            subject.examples.keep("prompt", subject.prompt_keys, **{name: won})
            yield f"{name}_rate", share(won)
            if (at_equal_length := share_at_zero(won, longer)) is not None:
                yield f"{name}_rate_equal_length", at_equal_length


def in_both_orders(
    judge: PairwiseJudge, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
) -> np.ndarray:
    """Wins of ours, [N]: the mean of the verdicts in both orders, so that a judge who likes the first best says 1/2."""
    return np.array(
        [(judge(p, a, b) + 1 - judge(p, b, a)) / 2 for p, a, b in zip(prompts, ours, theirs, strict=True)], np.float64
    )
