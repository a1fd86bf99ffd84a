"""KL divergence to the initial policy, estimated from samples and on reference texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean, ratio

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext


@dataclass
class KL(Evaluator, name="kl", order=40, is_default=True, needs_samples=True, needs_reward=False):
    """KL(trained || initial) over responses, in nats: the mean of log trained - log initial over the trained policy's
    samples.

    Unbiased, so it may be slightly negative if the policies are close. A response truncated at max_new_tokens counts up
    to there. kl_per_token: nats of all samples over tokens of all samples.

    kl_forward_text: the mean of log initial - log trained over held-out texts, in nats per text, an estimate of
    KL(texts || trained) - KL(texts || initial). It equals the forward KL(initial || trained) as far as the initial
    policy's distribution is that of the texts. May be negative.
    """

    of_texts = ("kl_forward_text",)
    labels = {
        "kl": "KL to initial policy (nats)",
        "kl_forward_text": "log-prob lost per text (nats)",
    }

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        trained, initial = context.sample_logps
        lengths = [len(s.tokens) for s in context.samples]
        context.examples.add("prompt", context.prompt_keys, kl=trained - initial)
        yield "kl", mean(trained - initial)
        yield "kl_per_token", ratio(trained - initial, lengths)
        if context.texts:
            trained, initial = context.text_logps
            yield "kl_forward_text", mean(initial - trained)
