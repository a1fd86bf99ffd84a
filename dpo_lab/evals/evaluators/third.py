"""The trained policy against a third one, on the same prompts and by the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.evals.evaluators.language import well_formed
from dpo_lab.evals.evaluators.win_rate import win_rates
from dpo_lab.stats.estimates import Estimate, mean, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext

PREFIX = "third/"
SHARES = ("stopped", "well_formed")


@dataclass
class Third(Evaluator, name="third_policy", order=65, is_default=False, needs_samples=True, needs_reward=False):
    """Samples of the policy in evals.third, and how the trained policy's differ from them; runs whenever it is set.

    third/METRIC is the third policy's mean of a metric, third/METRIC_difference the trained policy's minus the third's,
    with the interval of paired differences: gold and judge, the rewards; kl to the initial policy, in nats; length, in
    tokens of the initial policy's tokenizer; stopped; well_formed. third/win_rate and third/judge_win_rate, with their
    parts as in win_rate: how often the trained policy's response is better than the third's.

    A third policy with a tokenizer of its own has no kl: log-probabilities of different tokens are not compared.
    """

    labels = {
        "third/win_rate": "win rate against third, gold",
        "third/win_rate_equal_length": "  at equal length",
        "third/judge_win_rate": "win rate against third, judge",
        "third/judge_win_rate_equal_length": "  at equal length",
        "third/judge_first": "  judge prefers first shown",
        "third/judge_undecided": "  undecided by order",
        "third/judge_unanswered": "  judge gave no answer",
        "third/gold": "gold reward of third",
        "third/gold_difference": "  trained minus third",
        "third/judge": "judge score of third",
        "third/judge_difference": "  trained minus third",
        "third/kl": "KL of third to initial (nats)",
        "third/kl_difference": "  trained minus third",
        "third/well_formed": "well-formed samples of third",
        "third/well_formed_difference": "  trained minus third",
        "third/length": "length of third (tokens)",
        "third/length_difference": "  trained minus third",
    }

    @classmethod
    def is_implied(cls, settings) -> bool:
        return settings.third is not None

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        if context.third is None:
            return
        texts = context.completed(context.third_responses)
        rewards = {name: (context.rewards[name][0], values) for name, values in context.score_texts(texts).items()}
        lengths = _lengths(context)
        yield from win_rates(context, rewards, context.compared_with(context.third_responses), lengths, PREFIX)
        for name, (of_trained, of_third) in {**rewards, **_values(context, texts, lengths)}.items():
            trained, third = (np.asarray(values, np.float64) for values in (of_trained, of_third))
            context.examples.add("prompt", context.prompt_keys, **{f"{PREFIX}{name}": third})
            yield f"{PREFIX}{name}", (share if name in SHARES else mean)(third)
            yield f"{PREFIX}{name}_difference", mean(trained - third)


def _values(context: EvalContext, texts: Sequence[str], lengths: Sequence[int]) -> dict[str, tuple[Any, Any]]:
    """Return what else is measured of each sample of the trained and of the third policy, by metric.

    texts: prompt and response of the third policy; lengths: of its responses.
    """
    third = context.third
    assert third is not None
    values: dict[str, tuple[Any, Any]] = {}
    if third.shares_tokens:
        responses = [sample.tokens for sample in context.third_samples]
        own, initial = context.logps_under((third.policy, context.initial), context.prompt_ids, responses)
        values["kl"] = (np.subtract(*context.sample_logps), own - initial)
    if context.task is not None and context.task.has_grammar:
        of_trained = well_formed(context.task, context.samples, context.complete_texts(context.samples))
        values["well_formed"] = (of_trained, well_formed(context.task, context.third_samples, texts))
    values["length"] = ([len(sample.tokens) for sample in context.samples], lengths)
    values["stopped"] = ([s.stopped for s in context.samples], [s.stopped for s in context.third_samples])
    return values


def _lengths(context: EvalContext) -> list[int]:
    """Return the lengths of the third policy's samples, in tokens of the initial policy's tokenizer."""
    assert context.third is not None
    if context.third.shares_tokens:
        return [len(sample.tokens) for sample in context.third_samples]
    ids: Any = context.encoder.tokenizer(context.third_responses, add_special_tokens=False)["input_ids"]
    return [len(row) + sample.stopped for row, sample in zip(ids, context.third_samples, strict=True)]
