"""Language quality: whether the trained policy is still a language model of the texts that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.stats.estimates import Estimate, exp_of_ratio, mean, ratio, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.models.sampling import Sample


@dataclass
class Language:
    """Perplexity of held-out real texts, and of the samples: variety, repetition, entropy, length, whether they stop,
    well-formedness (where decidable).

    entropy: nats a token, the mean of -log of the policy that wrote them. Every figure for both policies: the initial one's
    under `initial/`.
    """

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        lengths = [len(response) for _, response in subject.texts]
        trained, initial = subject.text_logps
        subject.examples.keep("text", subject.text_keys, trained=trained, initial=initial, tokens=lengths)
        for prefix, samples, own, texts in (
            ("", subject.samples, subject.sample_logps[0], trained),
            ("initial/", subject.initial_samples, subject.initial_sample_logps, initial),
        ):
            responses, tokens = subject.responses(samples), [len(s.tokens) for s in samples]
            name = "initial_tokens" if prefix else "tokens"
            subject.examples.keep("prompt", subject.prompt_keys, **{name: tokens})
            if lengths:
                yield prefix + "perplexity", perplexity(texts, lengths)
            yield prefix + "distinct_1", distinct(responses, 1)
            yield prefix + "distinct_2", distinct(responses, 2)
            if (repeats := repeated(responses, 3)) is not None:
                yield prefix + "repeated_3", repeats
            yield prefix + "entropy", ratio(-own, tokens)
            yield prefix + "length", mean(tokens)
            yield prefix + "stopped", share([s.stopped for s in samples])
            if subject.world is not None and subject.world.decides_form:
                yield prefix + "well_formed", well_formed(subject, samples)


def well_formed(subject: EvalContext, samples: Sequence[Sample]) -> Estimate:
    """Share of samples that are reviews of the world and stopped by themselves."""
    assert subject.world is not None
    reviews = subject.reviews(samples)
    return share([s.stopped and subject.world.well_formed(text) for s, text in zip(samples, reviews, strict=True)])


def perplexity(logps: np.ndarray, lengths: Sequence[int]) -> Estimate:
    """exp of the mean negative log-probability (nats) of a token; logps [N]: of whole texts, lengths [N]: their tokens."""
    return exp_of_ratio((-logps).tolist(), lengths)


def distinct(texts: Sequence[str], n: int) -> Estimate:
    """Different n-grams of words over all n-grams of words, in all texts together."""
    found = [gram for text in texts for gram in _grams(text, n)]
    return Estimate(len(set(found)) / len(found) if found else 0.0, n=len(texts))


def repeated(texts: Sequence[str], n: int) -> Estimate | None:
    """Share of n-grams of words that stood earlier in the same text already; None where no text holds one."""
    totals = [len(_grams(text, n)) for text in texts]
    again = [total - len(set(_grams(text, n))) for total, text in zip(totals, texts, strict=True)]
    return ratio(again, totals) if sum(totals) else None


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
