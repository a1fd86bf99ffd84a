"""Win rate: how often a judge prefers the trained policy's response to the initial policy's for the same prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, share, share_at_zero, shares_of_known

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.evals.judges import Verdicts


@dataclass
class WinRate(Evaluator, name="win_rate", order=60, is_default=True, needs_samples=True, needs_reward=True):
    """Share of prompts for which the trained policy's response is better, where a tie counts half: `win_rate` by gold
    reward, `judge_win_rate` by the judge's scores or verdicts.

    `..._equal_length`: the length-controlled win rate, predicted at a length difference of 0 by a logistic regression
    of wins on the difference in tokens (after Dubois et al. 2024, arXiv:2404.04475, with one term); left out if the
    samples do not determine it.

    Of a judge that compares two responses, in both orders: `judge_first`, how often it prefers the one shown first,
    one half if the order does not matter to it; `judge_undecided`, the share of pairs of different responses on which
    its answers in the two orders contradict each other, which are ties; `judge_unanswered`, the share of questions
    without an answer.
    """

    labels = {
        "win_rate": "win rate, gold reward",
        "win_rate_equal_length": "  at equal length",
        "judge_win_rate": "win rate, judge",
        "judge_win_rate_equal_length": "  at equal length",
        "judge_first": "  judge prefers first shown",
        "judge_undecided": "  undecided by order",
        "judge_unanswered": "  judge gave no answer",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if not context.rewards and context.verdicts is None:
            return
        lengths = [len(sample.tokens) for sample in context.initial_samples]
        yield from win_rates(context, context.rewards, context.verdicts, lengths)


def win_rates(
    context: EvalContext,
    rewards: Mapping[str, tuple[np.ndarray, np.ndarray]],
    verdicts: Verdicts | None,
    lengths: Sequence[int],
    prefix: str = "",
) -> Iterator[tuple[str, Estimate]]:
    """Yield the metrics of WinRate of the trained policy's samples against others', and add their values to the examples.

    rewards: of the trained policy's samples and of the others, [N] each, by source; verdicts: of a judge on them; lengths:
    of the others, in tokens; prefix: of all names.
    """
    wins = {
        "win" if name == "gold" else f"{name}_win": np.heaviside(trained - other, 0.5)
        for name, (trained, other) in rewards.items()
    }
    if verdicts is not None:
        wins["judge_win"] = verdicts.wins
    length_difference = np.array([len(s.tokens) for s in context.samples], np.float64) - lengths
    for name, won in wins.items():
        context.examples.add("prompt", context.prompt_keys, **{f"{prefix}{name}": won})
        yield f"{prefix}{name}_rate", share(won)
        if (at_equal_length := share_at_zero(won, length_difference)) is not None:
            yield f"{prefix}{name}_rate_equal_length", at_equal_length
    by_order = verdicts.by_order() if verdicts is not None else {}
    columns = {f"{prefix}{name}": values for name, values in by_order.items()}
    context.examples.add("prompt", context.prompt_keys, **columns)
    yield from shares_of_known(columns)
