"""The exact engine: the sampler of this package, whose samples do not depend on batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.pairs import Tokens
from dpo_lab.evals.engines.base import Engine

if TYPE_CHECKING:
    from dpo_lab.data.tokenize import PairTokenizer
    from dpo_lab.models.policy import Policy
    from dpo_lab.models.sampling import Sample


@dataclass
class Exact(Engine, name="exact"):
    """Each prompt has random numbers of its own; batches are divided over ranks, see models/sampling.py."""

    def generate(
        self,
        policy: Policy,
        encoder: PairTokenizer,
        prompts: Sequence[Tokens],
        *,
        max_new_tokens: int,
        seed: int,
        batch_size: int,
        what: str,
    ) -> list[Sample]:
        from dpo_lab.models.sampling import generate_responses

        return generate_responses(
            policy.model, encoder, prompts, max_new_tokens=max_new_tokens, seed=seed, what=what, batch_size=batch_size
        )
