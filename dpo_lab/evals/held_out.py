"""Held-out loss of supervised fine-tuning, before and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.evals.context import score_pairs
from dpo_lab.stats.estimates import Estimate, exp_of_ratio, ratio

LABELS = {"loss": "loss (nats/token, held-out)", "perplexity": "perplexity of real text"}  # of what it measures


def heldout_loss(
    trained: PreTrainedModel,
    initial: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    tokens: int,
    context: Callable[[], AbstractContextManager],
) -> dict[str, Estimate]:
    """Return loss (nats per token) and perplexity of chosen responses under both models, the initial one's as
    `initial/...`.

    Returns {} if no pair is held out. For `tokens` and `context` see EvalContext. All ranks have to call it; all get
    the same.
    """
    if not len(pairs):
        return {}
    prompts, responses = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    estimates: dict[str, Estimate] = {}
    for prefix, model in (("", trained), ("initial/", initial)):
        sums, lengths = score_pairs(model, prompts, responses, tokens, context)
        nats, counts = (-sums.double()).tolist(), lengths.tolist()
        estimates |= {prefix + "loss": ratio(nats, counts), prefix + "perplexity": exp_of_ratio(nats, counts)}
    return estimates
