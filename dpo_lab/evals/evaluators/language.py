"""Language quality: whether the trained policy is still a language model of the texts that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, exp_of_ratio, mean, ratio, share

if TYPE_CHECKING:
    from dpo_lab.data.tasks.base import Task
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.models.sampling import Sample


@dataclass
class Language(Evaluator, name="language", order=70, is_default=True, needs_samples=True, needs_reward=False):
    """Perplexity of held-out real texts; and of the samples distinct n-grams, repetition, entropy, length, the share
    that stopped before max_new_tokens, and the share that is well-formed (if the task has a grammar).

    entropy: nats per token, the mean of -log p under the policy that sampled them. All metrics are measured for both
    policies, those of the initial one under `initial/`.
    """

    of_texts = ("perplexity",)
    labels = {
        "perplexity": "perplexity of real text",
        "well_formed": "well-formed samples",
        "distinct_2": "distinct bigrams",
        "repeated_3": "repeated trigrams",
        "entropy": "entropy (nats/token)",
        "length": "sample length (tokens)",
        "stopped": "samples with end token",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        lengths = [len(response) for _, response in context.texts]
        trained, initial = context.text_logps
        context.examples.add("text", context.text_keys, trained=trained, initial=initial, tokens=lengths)
        for prefix, samples, own, texts in (
            ("", context.samples, context.sample_logps[0], trained),
            ("initial/", context.initial_samples, context.initial_sample_logps, initial),
        ):
            responses, tokens = context.responses(samples), [len(s.tokens) for s in samples]
            name = "initial_tokens" if prefix else "tokens"
            context.examples.add("prompt", context.prompt_keys, **{name: tokens})
            if lengths:
                yield prefix + "perplexity", perplexity(texts, lengths)
            yield prefix + "distinct_1", distinct(responses, 1)
            yield prefix + "distinct_2", distinct(responses, 2)
            if (repeats := repeated(responses, 3)) is not None:
                yield prefix + "repeated_3", repeats
            yield prefix + "entropy", ratio(-own, tokens)
            yield prefix + "length", mean(tokens)
            yield prefix + "stopped", share([s.stopped for s in samples])
            if context.task is not None and context.task.has_grammar:
                yield prefix + "well_formed", share(well_formed(context.task, samples, context.completed(responses)))


def well_formed(task: Task, samples: Sequence[Sample], texts: Sequence[str]) -> list[bool]:
    """Return which samples ended with the end token and are well-formed in the task's grammar; texts: with prompts."""
    return [s.stopped and task.well_formed(text) for s, text in zip(samples, texts, strict=True)]


def perplexity(logps: np.ndarray, lengths: Sequence[int]) -> Estimate:
    """Return exp of the mean negative log-probability per token; logps [N]: nats per text, lengths [N]: tokens per
    text.
    """
    return exp_of_ratio((-logps).tolist(), lengths)


def distinct(texts: Sequence[str], n: int) -> Estimate:
    """Return the number of distinct n-grams of words over that of all n-grams, in all texts together."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return Estimate(len(set(grams)) / len(grams) if grams else 0.0, n=len(texts))


def repeated(texts: Sequence[str], n: int) -> Estimate | None:
    """Return the share of n-grams of words that repeat one of the same text; None if there are no n-grams."""
    totals = [len(_grams(text, n)) for text in texts]
    repeats = [total - len(set(_grams(text, n))) for total, text in zip(totals, texts, strict=True)]
    return ratio(repeats, totals) if sum(totals) else None


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
