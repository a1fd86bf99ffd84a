"""What an evaluator is given: the trained policy, the initial one, held-out pairs and texts, and samples made once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from transformers import PreTrainedModel

from dpo_lab.core.pairs import EncodedPair, PairLogps, Tokens, cut
from dpo_lab.core.ranks import P, R, across, rank_and_world_size
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.data.tokenize import Encoder
from dpo_lab.data.world.world import World
from dpo_lab.models.forward import pair_logps, response_logps
from dpo_lab.models.policy import Policy
from dpo_lab.models.sampling import Sample, respond
from dpo_lab.results.estimates import Estimate
from dpo_lab.results.progress import track


class Evaluator(Protocol):
    """Yields (name, estimate); a name is `thing` or `thing/part`, the same in every run."""

    def run(self, subject: Subject) -> Iterator[tuple[str, Estimate]]: ...


@dataclass
class Subject:
    """A trained policy under evaluation.

    pairs: held-out pairs, never flipped; prompts, prompt_ids: what samples answer, as text and as token ids; texts: held-out
    (prompt, response) of the real distribution, as token ids; world: where the truth is known, else None; tokens: about how
    many a forward takes; batch_size: samples made side by side; context: what forwards run under (autocast): a policy is
    sampled and scored in one and the same precision.

    Where several ranks compute together all of them have to evaluate, equal subjects: each makes its share of the samples
    and of the forwards, and all come to the same figures, to the last bit those of one process.
    """

    trained: Policy
    initial: Policy
    encoder: Encoder
    pairs: Sequence[EncodedPair]
    prompts: Sequence[str]
    prompt_ids: Sequence[Tokens]
    texts: Sequence[tuple[Tokens, Tokens]]
    world: World | None
    max_new_tokens: int
    tokens: int
    batch_size: int
    seed: int
    context: Callable[[], AbstractContextManager] = nullcontext

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
        return self.logps_of(self.pairs)

    def logps_of(self, pairs: Sequence[EncodedPair]) -> tuple[PairLogps, PairLogps]:
        """Of any pairs: the trained policy's and the initial policy's."""
        return self._pair_logps(self.trained.model, pairs), self._pair_logps(self.initial.model, pairs)

    def response_logps(
        self, model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability (nats) of each response to its prompt, and its number of tokens."""
        return scored(model, prompts, responses, self.tokens, self.context)

    def _sample(self, policy: Policy, whose: str) -> list[Sample]:
        with self.context():
            return respond(
                policy.model,
                self.encoder,
                self.prompt_ids,
                max_new_tokens=self.max_new_tokens,
                seed=derive_seed(self.seed, f"evaluation/{whose}"),
                batch_size=self.batch_size,
                what=f"Samples ({whose})",
                by_ranks=True,
            )

    @torch.no_grad()
    def _pair_logps(self, model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> PairLogps:
        device = next(model.parameters()).device
        sizes = [pair.size for pair in pairs]
        parts = cut(sizes, self.tokens)

        def compute(part: slice) -> PairLogps:
            with self.context():
                logps = pair_logps(model, collate(pairs[part]).to(device))
            return PairLogps(*(column.cpu() for column in _columns(logps)))

        found = _across("Log-probs of pairs", parts, [sum(sizes[part]) for part in parts], compute)
        return PairLogps(*(torch.cat(column) for column in zip(*map(_columns, found), strict=True)))


def _columns(logps: PairLogps) -> tuple[torch.Tensor, ...]:
    return logps.chosen, logps.rejected, logps.chosen_length, logps.rejected_length


def _across(what: str, parts: Sequence[P], sizes: Sequence[float], compute: Callable[[P], R]) -> list[R]:
    """The same as `across`, with a bar called `what` on rank 0 where it takes long; it counts parts, ours as they are done."""
    ours = 0
    with track(what, len(parts), shown=rank_and_world_size()[0] == 0, least=1.0) as advance:

        def counted(part: P) -> R:
            nonlocal ours
            found = compute(part)
            ours += 1
            advance(1)
            return found

        found = across(parts, sizes, counted)
        advance(len(parts) - ours)
    return found


@torch.no_grad()
def scored(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    tokens: int,
    context: Callable[[], AbstractContextManager],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability (nats) of each response to its prompt, and its number of tokens; see Subject for the rest.

    All ranks have to call it; each computes its share, all get the whole.
    """
    device = next(model.parameters()).device
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])

    def compute(chosen: list[int]) -> torch.Tensor:
        stream, lengths = collate_responses([prompts[i] for i in chosen], [responses[i] for i in chosen])
        with context():
            return response_logps(model, stream.to(device), lengths.to(device))[:, 0].float().cpu()

    parts = [order[part] for part in cut([sizes[i] for i in order], tokens)]
    sums = torch.empty(len(sizes))
    work = [sum(sizes[i] for i in part) for part in parts]
    for chosen, found in zip(parts, _across("Log-probs of texts", parts, work, compute), strict=True):
        sums[chosen] = found
    return sums, torch.tensor([len(response) for response in responses])
