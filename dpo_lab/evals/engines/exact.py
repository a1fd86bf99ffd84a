"""The exact engine: the sampler of this package, whose samples do not depend on batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.evals.engines.base import Engine, Request

if TYPE_CHECKING:
    from dpo_lab.models.sampling import Sample


@dataclass
class Exact(Engine, name="exact"):
    """Each prompt has random numbers of its own; batches are divided over ranks, see models/sampling.py."""

    def generate(self, request: Request) -> list[Sample]:
        from dpo_lab.models.sampling import generate_responses

        return generate_responses(
            request.policy.model,
            request.encoder,
            request.prompts,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            what=request.what,
            batch_size=request.batch_size,
        )
