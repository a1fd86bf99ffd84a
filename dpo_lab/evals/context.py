"""What an evaluator receives: trained and initial policy, held-out pairs and texts, and samples generated once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_lab.core.losses import DPO, Loss
from dpo_lab.core.pairs import EncodedPair, PairLogps, Tokens, chunk_by_size, content_hash
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.data.tasks.base import Task
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import P, R, map_across_ranks, rank_and_world_size
from dpo_lab.evals.candidates import candidates
from dpo_lab.evals.judge import Score
from dpo_lab.evals.scored_pairs import ScoredPairs
from dpo_lab.evals.win_rate import PairwiseJudge
from dpo_lab.models.forward import pair_logps, response_logps
from dpo_lab.models.policy import Policy
from dpo_lab.models.reference import ReferenceLogps
from dpo_lab.models.sampling import Sample, generate_responses
from dpo_lab.runs.examples import Examples, numbered
from dpo_lab.stats.estimates import Estimate
from dpo_lab.terminal.progress import track


class Evaluator(Protocol):
    """Yields (name, estimate); a name is `thing` or `thing/part`, the same in every run. What it measured of each example it
    leaves in subject.examples.
    """

    def run(self, subject: EvalContext) -> Iterator[tuple[str, Estimate]]: ...


@dataclass
class EvalContext:
    """A trained policy under evaluation.

    pairs: held-out pairs, never flipped; train_pairs: some that it was trained on, as it was; prompts, prompt_ids: what
    samples answer, as text and as token ids; texts: held-out (prompt, response) of the real distribution, as token ids;
    world: where the truth is known, else None; tokens: about how many a forward takes; batch_size: samples made side by side;
    context: what forwards run under (autocast): a policy is sampled and scored in one and the same precision; loss: what
    forms the implicit reward; reference: what it compares the policy with, None for the initial policy; judge: scores texts,
    prompt and response; pairwise: compares two responses; cache: a folder to keep the initial policy's candidates in, which
    many runs share.

    Where several ranks compute together all of them have to evaluate, equal subjects: each makes its share of the samples
    and of the forwards, and all come to the same figures, to the last bit those of one process.
    """

    trained: Policy
    initial: Policy
    encoder: PairTokenizer
    pairs: Sequence[EncodedPair]
    prompts: Sequence[str]
    prompt_ids: Sequence[Tokens]
    texts: Sequence[tuple[Tokens, Tokens]]
    world: Task | None
    max_new_tokens: int
    tokens: int
    batch_size: int
    seed: int
    context: Callable[[], AbstractContextManager] = nullcontext
    train_pairs: Sequence[EncodedPair] = ()
    loss: Loss = field(default_factory=DPO)
    reference: ReferenceLogps | None = None
    judge: Score | None = None
    pairwise: PairwiseJudge | None = None
    cache: Path | None = None
    examples: Examples = field(default_factory=Examples)

    @cached_property
    def samples(self) -> list[Sample]:
        """One response of the trained policy for each prompt."""
        return self._sample(self.trained, "trained")

    @cached_property
    def initial_samples(self) -> list[Sample]:
        """One response of the initial policy for each prompt."""
        return self._sample(self.initial, "initial")

    @property
    def side_by_side(self) -> list[dict[str, str]]:
        """Prompts and both policies' responses, as text; nothing where no evaluator asked for both."""
        if not {"samples", "initial_samples"} <= self.__dict__.keys():
            return []
        columns = (self.prompts, self.responses(self.initial_samples), self.responses(self.samples))
        return [dict(zip(("prompt", "initial", "trained"), row, strict=True)) for row in zip(*columns, strict=True)]

    def keep_texts(self) -> None:
        """Put prompts and responses, as text, among the examples, where both policies were sampled."""
        for key, row in zip(self.prompt_keys, self.side_by_side, strict=False):
            texts = {"prompt": [row["prompt"]], "response": [row["trained"]], "initial_response": [row["initial"]]}
            self.examples.keep("prompt", [key], **texts)

    @cached_property
    def prompt_keys(self) -> list[str]:
        """A name for each prompt: a hash of its token ids, and which time it comes."""
        return numbered(_hash(prompt) for prompt in self.prompt_ids)

    @cached_property
    def text_keys(self) -> list[str]:
        """The same of the texts."""
        return numbered(_hash(prompt, response) for prompt, response in self.texts)

    def responses(self, samples: Sequence[Sample]) -> list[str]:
        """Samples as text, without the end token."""
        return [self.encoder.text(s.tokens) for s in samples]

    def reviews(self, samples: Sequence[Sample]) -> list[str]:
        """Prompt and response as one text."""
        return [p + r for p, r in zip(self.prompts, self.responses(samples), strict=True)]

    @cached_property
    def rewards(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What the trained and the initial policy's samples are worth, [N] each, by who says so: `gold`, `judge`."""
        if self.world is None and self.judge is None:
            return {}
        of_trained, of_initial = (self._worth(self.reviews(made)) for made in (self.samples, self.initial_samples))
        return {name: (of_trained[name], of_initial[name]) for name in of_trained}

    def candidate_rewards(self, prompts: int, count: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """The first `prompts` distinct prompts, by key, and what `count` responses of the initial policy to each are worth,
        [P, count], by who says so; nothing where no one does.
        """
        if self.world is None and self.judge is None:
            return [], {}
        first: dict[tuple[int, ...], int] = {}
        for place, prompt in enumerate(self.prompt_ids):
            first.setdefault(tuple(int(token) for token in prompt), place)
        places = list(first.values())[:prompts]
        responses = candidates(
            self.initial,
            self.encoder,
            [self.prompt_ids[place] for place in places],
            count,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=derive_seed(self.seed, "evaluation/candidates"),
            context=self.context,
            folder=self.cache,
        )
        worth = self._worth([self.prompts[at] + text for at, of in zip(places, responses, strict=True) for text in of])
        rewards = {name: values.reshape(len(places), count) for name, values in worth.items()}
        return [self.prompt_keys[place] for place in places], rewards

    def _worth(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What texts, prompt and response, are worth, [N], by who says so."""
        found: dict[str, np.ndarray] = {}
        if self.world is not None:
            found["gold"] = np.array([self.world.gold(text) for text in texts])
        if self.judge is not None:
            found["judge"] = np.asarray(self.judge(texts), np.float64)
        return found

    @cached_property
    def sample_logps(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (nats) of the trained policy's samples: the trained's and the initial policy's, [N] each."""
        return self._of_both(self.prompt_ids, [s.tokens for s in self.samples])

    @cached_property
    def initial_sample_logps(self) -> np.ndarray:
        """Log-probabilities (nats) of the initial policy's samples, its own, [N]."""
        responses = [s.tokens for s in self.initial_samples]
        return self.response_logps(self.initial.model, self.prompt_ids, responses)[0].double().numpy()

    @cached_property
    def text_logps(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (nats) of the held-out texts: the trained's and the initial policy's, [N] each."""
        return self._of_both([prompt for prompt, _ in self.texts], [response for _, response in self.texts])

    @cached_property
    def held_out(self) -> ScoredPairs:
        """The held-out pairs under both policies."""
        reference = None if self.reference is None else self.reference(collate(self.pairs))
        return ScoredPairs(self.pairs, *self.pair_logps, reference)

    @cached_property
    def train(self) -> ScoredPairs:
        """The training pairs under both policies."""
        both = (self._pair_logps(policy.model, self.train_pairs) for policy in (self.trained, self.initial))
        return ScoredPairs(self.train_pairs, *both)

    @cached_property
    def pair_logps(self) -> tuple[PairLogps, PairLogps]:
        """Of the held-out pairs: the trained policy's and the initial policy's."""
        return self._pair_logps(self.trained.model, self.pairs), self._pair_logps(self.initial.model, self.pairs)

    def _of_both(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
        trained, initial = (
            self.response_logps(policy.model, prompts, responses)[0].double().numpy()
            for policy in (self.trained, self.initial)
        )
        return trained, initial

    def response_logps(
        self, model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability (nats) of each response to its prompt, and its number of tokens."""
        return score_pairs(model, prompts, responses, self.tokens, self.context)

    def _sample(self, policy: Policy, whose: str) -> list[Sample]:
        with self.context():
            return generate_responses(
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
        parts = chunk_by_size(sizes, self.tokens)

        def compute(part: slice) -> PairLogps:
            with self.context():
                logps = pair_logps(model, collate(pairs[part]).to(device))
            return PairLogps(*(column.cpu() for column in _columns(logps)))

        found = _across("Log-probs of pairs", parts, [sum(sizes[part]) for part in parts], compute)
        return PairLogps(*(torch.cat(column) for column in zip(*map(_columns, found), strict=True)))


def _hash(*parts: Tokens) -> str:
    return content_hash([[int(token) for token in part] for part in parts])


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

        found = map_across_ranks(parts, sizes, counted)
        advance(len(parts) - ours)
    return found


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    tokens: int,
    context: Callable[[], AbstractContextManager],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability (nats) of each response to its prompt, and its number of tokens; see EvalContext for the rest.

    All ranks have to call it; each computes its share, all get the whole.
    """
    device = next(model.parameters()).device
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])

    def compute(chosen: list[int]) -> torch.Tensor:
        stream, lengths = collate_responses([prompts[i] for i in chosen], [responses[i] for i in chosen])
        with context():
            return response_logps(model, stream.to(device), lengths.to(device))[:, 0].float().cpu()

    parts = [order[part] for part in chunk_by_size([sizes[i] for i in order], tokens)]
    sums = torch.empty(len(sizes))
    work = [sum(sizes[i] for i in part) for part in parts]
    for chosen, found in zip(parts, _across("Log-probs of texts", parts, work, compute), strict=True):
        sums[chosen] = found
    return sums, torch.tensor([len(response) for response in responses])
