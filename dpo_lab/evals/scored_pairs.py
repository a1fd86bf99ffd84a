"""Log-probabilities of pairs under both policies, as columns, and those of responses: what evaluators compute from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import zero_out_rounding
from dpo_lab.core.pair_table import prompt_groups
from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps, Tokens, chunk_by_size
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.models.forward import response_logps
from dpo_lab.models.passes import map_passes
from dpo_lab.models.sharding import device_of


@dataclass(frozen=True)
class ScoredPairs:
    """B pairs with their log-probabilities under the trained and the initial policy; every column is [B], in nats."""

    pairs: Sequence[EncodedPair]
    trained: PairLogps
    initial: PairLogps
    reference: PairLogps | None = None  # the reference of the loss; None for the initial policy

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def paired(self) -> ScoredPairs:
        """Those that have two responses, without responses that were labelled on their own."""
        both = (self.trained.chosen_length > 0) & (self.trained.rejected_length > 0)
        if both.all():
            return self
        pairs = [pair for pair, has_both in zip(self.pairs, both.tolist(), strict=True) if has_both]
        reference = None if self.reference is None else self.reference[both]
        return ScoredPairs(pairs, self.trained[both], self.initial[both], reference)

    @cached_property
    def keys(self) -> list[str]:
        return [pair.key for pair in self.pairs]

    @cached_property
    def prompts(self) -> np.ndarray:
        """Index of each pair's prompt among the distinct ones, [B]."""
        return prompt_groups(self.pairs)

    @cached_property
    def gold(self) -> np.ndarray:
        """True reward of chosen minus that of rejected; NaN if unknown."""
        return np.array([pair.gold_margin for pair in self.pairs], np.float64)

    @cached_property
    def flipped(self) -> np.ndarray:
        return np.array([pair.flipped for pair in self.pairs], bool)

    @cached_property
    def margins(self) -> np.ndarray:
        """Log-ratio margins, chosen - rejected; 0 where they are within rounding error."""
        ratios = self.trained - self.initial
        return zero_out_rounding(ratios.margin, self.trained, self.initial).double().numpy()

    @cached_property
    def change(self) -> tuple[np.ndarray, np.ndarray]:
        """Changes of the log-probabilities of chosen and of rejected from the initial to the trained policy, of those that
        there are.
        """
        ratios = self.trained - self.initial
        chosen, rejected = ratios.chosen[ratios.chosen_length > 0], ratios.rejected[ratios.rejected_length > 0]
        return chosen.double().numpy(), rejected.double().numpy()

    def rewards(self, loss: Loss) -> np.ndarray:
        """Return margins of the implicit reward: beta times the scores, to the loss's reference, that `loss` compares."""
        reference = self.initial if self.reference is None else self.reference
        summed = zero_out_rounding((self.trained - reference).margin, self.trained, reference)
        margins = loss.scores(self.trained, reference).margin.double()
        return (loss.beta * margins).masked_fill(summed == 0, 0.0).numpy()

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns for the records per example, see runs/examples.py."""
        return {
            "margin": self.margins,
            "trained_chosen": self.trained.chosen.double().numpy(),
            "trained_rejected": self.trained.rejected.double().numpy(),
            "initial_chosen": self.initial.chosen.double().numpy(),
            "initial_rejected": self.initial.rejected.double().numpy(),
            "gold_margin": self.gold,
            "flipped": self.flipped,
            "chosen_length": self.trained.chosen_length.numpy(),
            "rejected_length": self.trained.rejected_length.numpy(),
        }


@torch.no_grad()
def logps_of_pairs(
    model: PreTrainedModel | None,
    logps_of: Callable[[PairBatch], PairLogps],
    pairs: Sequence[EncodedPair],
    tokens: int,
    context: Callable[[], AbstractContextManager],
    device: torch.device,
    title: str = "Log-probs of pairs",
) -> PairLogps:
    """Return the log-probabilities of pairs by `logps_of`, on the CPU, in parts of about `tokens` tokens.

    model: the one that `logps_of` runs, None for none; context, device: of forward passes.
    All ranks have to call it; each computes its share, all get all results.
    """
    sizes = [pair.size for pair in pairs]
    parts = chunk_by_size(sizes, tokens)

    def compute(part: slice) -> PairLogps:
        with context():
            logps = logps_of(collate(pairs[part]).to(device))
        return logps.to("cpu")

    logps = map_passes(title, model, parts, [sum(sizes[part]) for part in parts], compute, least=1.0)
    return PairLogps.concat(logps)


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    tokens: int,
    context: Callable[[], AbstractContextManager],
    score: Callable[[PreTrainedModel, torch.Tensor, np.ndarray], torch.Tensor] = response_logps,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability (nats) of each response given its prompt, and its number of tokens.

    score: another function of model, packed stream and lengths than response_logps, whose values are returned instead.
    For `tokens` and `context` see logps_of_pairs. All ranks have to call it; each computes its share, all get all results.
    """
    device = device_of(model)
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])

    def compute(indices: list[int]) -> torch.Tensor:
        stream, lengths = collate_responses([prompts[i] for i in indices], [responses[i] for i in indices])
        with context():
            return score(model, stream.to(device), lengths)[:, 0].float().cpu()

    parts = [order[part] for part in chunk_by_size([sizes[i] for i in order], tokens)]
    sums = torch.empty(len(sizes))
    work = [sum(sizes[i] for i in part) for part in parts]
    for indices, logps in zip(
        parts, map_passes("Log-probs of texts", model, parts, work, compute, least=1.0), strict=True
    ):
        sums[indices] = logps
    return sums, torch.tensor([len(response) for response in responses])
