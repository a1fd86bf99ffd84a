"""KL divergence to the initial policy, estimated from samples and on reference texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.stats.estimates import Estimate, mean, ratio

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class KL:
    """KL(trained || initial) over responses, in nats: the mean of log trained - log initial over the trained's samples.

    Unbiased, so it may come out slightly negative where the policies agree. A response cut at max_new_tokens counts up to
    its cut. kl_per_token: nats of all samples over tokens of all samples.

    kl_forward_text: the mean of log initial - log trained over held-out texts, nats a text. It estimates by how much
    further than the initial policy the trained one is from the texts, KL(texts || trained) - KL(texts || initial): the
    forward KL(initial || trained) itself as far as the initial policy writes as those texts are written. May be negative.
    """

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]:
        trained, initial = subject.sample_logps
        lengths = [len(s.tokens) for s in subject.samples]
        subject.examples.keep("prompt", subject.prompt_keys, kl=trained - initial)
        yield "kl", mean(trained - initial)
        yield "kl_per_token", ratio(trained - initial, lengths)
        if subject.texts:
            trained, initial = subject.text_logps
            yield "kl_forward_text", mean(initial - trained)
