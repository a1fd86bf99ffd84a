"""Candidates: many responses of the initial policy to each prompt, sampled once for all runs that start from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from dpo_lab.core.pairs import Tokens, content_hash
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.engines import Engine, Request
from dpo_lab.evals.engines.exact import Exact
from dpo_lab.models.numerics import numerics_of
from dpo_lab.models.passes import cached_by_ranks
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.runs.out_of_memory import explain_out_of_memory, halved

EXACT = Exact()
FORMAT = "2"  # increase it when a change of the code changes the texts of a key


def candidates(
    policy: Policy,
    encoder: PairTokenizer,
    prompts: Sequence[Tokens],
    count: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    context: Callable[[], AbstractContextManager],
    folder: Path | None,
    engine: Engine = EXACT,
) -> list[list[str]]:
    """Return `count` sampled responses of the policy, as text, to each encoded prompt, cached in `folder`.

    The file's name is a hash of everything that determines the responses; a damaged file is replaced. All ranks have to
    call it and share the sampling; of several runs one samples while the others wait. folder: None disables the cache.
    """
    prompts_hash = content_hash([[int(token) for token in prompt] for prompt in prompts])
    inputs = [
        weights_digest(policy.model),
        encoder.fingerprint,
        numerics_of(policy.model, context),
        prompts_hash,
        count,
        max_new_tokens,
        seed,
        FORMAT,
        *([] if engine == EXACT else [engine.name, asdict(engine)]),
    ]
    key = content_hash(inputs)
    path = folder / f"candidates-{key[:16]}.json" if folder is not None else None

    def make() -> bytes:
        with context(), sampling_explained(batch_size, count * len(prompts)):
            repeated = [prompt for prompt in prompts for _ in range(count)]
            what = "Candidates (initial)"
            samples = engine.generate(Request(policy, encoder, repeated, max_new_tokens, seed, batch_size, what))
        texts = [encoder.text(sample.tokens) for sample in samples]
        return json.dumps([texts[start : start + count] for start in range(0, len(texts), count)]).encode()

    return json.loads(cached_by_ranks(path, make))


def sampling_explained(batch_size: int, samples: int) -> AbstractContextManager[None]:
    """Return a context that explains out of memory in sampling so many samples by the size of their batches."""
    return explain_out_of_memory("sampling", *halved("evals.batch_size", min(batch_size, samples)))
