"""Language quality: is the trained policy still a language model of the texts that it came from?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_lab.evals.subject import Subject
from dpo_lab.models.policy import Policy
from dpo_lab.models.sampling import Sample
from dpo_lab.results.estimates import Estimate, exp_of_ratio, mean, share


@dataclass
class Language:
    """Perplexity of held-out real texts, and of the samples: well-formedness (where decidable), variety, length, stops.

    Every figure for both policies: the initial one's under `initial/`.
    """

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        for prefix, policy, samples in (
            ("", subject.trained, subject.samples),
            ("initial/", subject.initial, subject.initial_samples),
        ):
            yield prefix + "perplexity", perplexity(subject, policy)
            yield prefix + "distinct_2", distinct(subject.responses(samples), 2)
            yield prefix + "length", mean([len(s.tokens) for s in samples])
            yield prefix + "stopped", share([s.stopped for s in samples])
            if subject.world is not None and subject.world.decides_form:
                yield prefix + "well_formed", well_formed(subject, samples)


def well_formed(subject: Subject, samples: Sequence[Sample]) -> Estimate:
    """Share of samples that are reviews of the world and stopped by themselves."""
    assert subject.world is not None
    reviews = subject.reviews(samples)
    return share([s.stopped and subject.world.well_formed(text) for s, text in zip(samples, reviews, strict=True)])


def perplexity(subject: Subject, policy: Policy) -> Estimate:
    """exp of the mean negative log-probability (nats) of a response token of the held-out texts."""
    prompts, responses = [prompt for prompt, _ in subject.texts], [response for _, response in subject.texts]
    sums, lengths = subject.response_logps(policy.model, prompts, responses)
    return exp_of_ratio((-sums.double()).tolist(), lengths.tolist())


def distinct(texts: Sequence[str], n: int) -> Estimate:
    """Different n-grams of words over all n-grams of words, in all texts together."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return Estimate(len(set(grams)) / len(grams) if grams else 0.0, n=len(texts))
