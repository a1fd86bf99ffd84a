"""What an evaluator is given: the trained policy, the initial one, held-out pairs and texts, and samples made once for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from transformers import PreTrainedModel

from dpo_lab.core.logps import response_rows, sequence_logps
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate
from dpo_lab.data.tokenize import Encoder
from dpo_lab.data.world.world import World
from dpo_lab.models.policy import Policy, pair_logps
from dpo_lab.models.sampling import Sample, respond
from dpo_lab.results.estimates import Estimate


class Evaluator(Protocol):
    """Yields (name, estimate); a name is `thing` or `thing/part`, the same in every run."""

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]: ...


@dataclass
class Subject:
    """A trained policy under evaluation.

    pairs: held-out pairs, never flipped; prompts: what samples answer; texts: held-out (prompt, response) texts of the
    real distribution; world: where the truth is known, else None.
    """

    trained: Policy
    initial: Policy
    encoder: Encoder
    pairs: Sequence[EncodedPair]
    prompts: Sequence[str]
    texts: Sequence[tuple[str, str]]
    world: World | None
    max_new_tokens: int
    batch_size: int
    seed: int

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        return [self.encoder.prompt(p) for p in self.prompts]

    @cached_property
    def samples(self) -> list[Sample]:
        """One response of the trained policy for each prompt."""
        return self._sample(self.trained, "trained")

    @cached_property
    def initial_samples(self) -> list[Sample]:
        """One response of the initial policy for each prompt."""
        return self._sample(self.initial, "initial")

    def responses(self, samples: Sequence[Sample]) -> list[str]:
        """Samples as text, without the end token."""
        return [self.encoder.text(s.tokens) for s in samples]

    def reviews(self, samples: Sequence[Sample]) -> list[str]:
        """Prompt and response as one text."""
        return [p + r for p, r in zip(self.prompts, self.responses(samples), strict=True)]

    @cached_property
    def pair_logps(self) -> tuple[PairLogps, PairLogps]:
        """Of the held-out pairs: the trained policy's and the initial policy's."""
        return self._pair_logps(self.trained.model), self._pair_logps(self.initial.model)

    @torch.no_grad()
    def response_logps(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability (nats) of each response to its prompt, and its number of tokens."""
        device = next(model.parameters()).device
        sums, lengths = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.long)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            rows, labels = response_rows([prompts[i] for i in chosen], [responses[i] for i in chosen], pad_id=0)
            logits = model(input_ids=rows.to(device), use_cache=False).logits
            row_sums, row_lengths = sequence_logps(logits, labels.to(device))
            sums[chosen], lengths[chosen] = row_sums.float().cpu(), row_lengths.cpu()
        return sums, lengths

    def _sample(self, policy: Policy, whose: str) -> list[Sample]:
        return respond(
            policy.model,
            self.encoder,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            seed=derive_seed(self.seed, f"evaluation/{whose}"),
            what=f"Samples ({whose})",
        )

    @torch.no_grad()
    def _pair_logps(self, model: PreTrainedModel) -> PairLogps:
        device = next(model.parameters()).device
        parts = [
            pair_logps(model, collate(self.pairs[i : i + self.batch_size]).to(device))
            for i in range(0, len(self.pairs), self.batch_size)
        ]
        return PairLogps(
            torch.cat([p.chosen for p in parts]).cpu(),
            torch.cat([p.rejected for p in parts]).cpu(),
            torch.cat([p.chosen_length for p in parts]).cpu(),
            torch.cat([p.rejected_length for p in parts]).cpu(),
        )
