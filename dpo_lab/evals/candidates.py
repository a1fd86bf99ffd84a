"""Candidates: many responses of the initial policy to each prompt, sampled once for all runs that start from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock

from dpo_lab.core.pairs import Tokens, content_hash
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import all_gather_object, rank_and_world_size
from dpo_lab.models.numerics import numerics_of
from dpo_lab.models.policy import Policy, weights_digest
from dpo_lab.models.sampling import generate_responses
from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.cache import is_intact, write_checksum
from dpo_lab.runs.out_of_memory import explain_out_of_memory, halved

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
    ]
    key = content_hash(inputs)
    path = folder / f"candidates-{key[:16]}.json" if folder is not None else None
    with _locked(path):
        cached = all_gather_object(_read(path) if path is not None and rank_and_world_size()[0] == 0 else None)[0]
        if cached is not None:
            return cached
        with context(), sampling_explained(batch_size, count * len(prompts)):
            samples = generate_responses(
                policy.model,
                encoder,
                [prompt for prompt in prompts for _ in range(count)],
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_size=batch_size,
                what="Candidates (initial)",
                by_ranks=True,
            )
        texts = [encoder.text(sample.tokens) for sample in samples]
        responses = [texts[start : start + count] for start in range(0, len(texts), count)]
        if path is not None and rank_and_world_size()[0] == 0:
            write_atomic(path, json.dumps(responses))
            write_checksum(path)
        return responses


def sampling_explained(batch_size: int, samples: int) -> AbstractContextManager[None]:
    """Return a context that explains out of memory in sampling so many samples by the size of their batches."""
    return explain_out_of_memory("sampling", *halved("evals.batch_size", min(batch_size, samples)))


def _locked(path: Path | None) -> AbstractContextManager:
    """Lock the file, on rank 0 for all ranks."""
    if path is None or rank_and_world_size()[0] != 0:
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def _read(path: Path) -> list[list[str]] | None:
    return json.loads(path.read_text(encoding="utf-8")) if is_intact(path) else None
