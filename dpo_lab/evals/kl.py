"""KL divergence to the initial policy, by sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lab.evals.subject import Subject
from dpo_lab.results.estimates import Estimate, mean


@dataclass
class KL:
    """KL(trained || initial) over responses, in nats: the mean of log trained - log initial over the trained's samples.

    Unbiased, so it may come out slightly negative where the policies agree. A response cut at max_new_tokens counts up to
    its cut.
    """

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]:
        responses = [s.tokens for s in subject.samples]
        trained, lengths = subject.response_logps(subject.trained.model, subject.prompt_ids, responses)
        initial, _ = subject.response_logps(subject.initial.model, subject.prompt_ids, responses)
        per_sequence = mean((trained - initial).tolist())
        yield "kl", per_sequence
        yield "kl_per_token", Estimate(per_sequence.value / lengths.double().mean().item(), n=len(responses))
