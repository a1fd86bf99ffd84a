"""What an evaluator receives: trained and initial policy, held-out pairs and texts, and samples generated once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_lab.core.losses.base import Loss
from dpo_lab.core.losses.dpo import DPO
from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps, Tokens, content_hash
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.pair_sets import SetPair
from dpo_lab.data.tasks.base import Task
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.candidates import candidates, sampling_explained
from dpo_lab.evals.engines import Engine, Request
from dpo_lab.evals.engines.exact import Exact
from dpo_lab.evals.judges import LoadedJudge, Scorer, Verdicts
from dpo_lab.evals.scored_pairs import ScoredPairs, logps_of_pairs, score_pairs
from dpo_lab.evals.third_policy import ThirdPolicy
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.policy import Policy
from dpo_lab.models.reference import ReferenceLogps, reference_model
from dpo_lab.models.sampling import Sample
from dpo_lab.models.sharding import device_of
from dpo_lab.runs.examples import Examples, numbered


@dataclass
class EvalContext:
    """A trained policy under evaluation, with the data, the settings and the cached results that evaluators share.

    pairs: held-out pairs, never flipped; train_pairs: some of the training pairs, as trained on; pair_sets: further
    pairs, by the names of evals.pairs; prompts, prompt_ids:
    prompts of the samples, as text and as token ids; texts: held-out (prompt, response) of the real distribution, as
    token ids; task: the task if there is one, which knows the gold reward, else None; tokens: approximate number of
    tokens per forward pass; batch_size: samples generated per batch; context: context manager of forward passes
    (autocast), so that a policy is sampled and scored in the same precision; loss: defines the implicit reward;
    reference: its reference, None for the initial policy; judge: scores or compares responses; cache: folder for
    the candidates of the initial policy, shared by many runs; engine: samples responses; third: a third policy, if there
    is one; prompt_file: name of the file that the prompts are from, "" for those of the data.

    With several ranks, all ranks have to evaluate equal contexts: each computes its share of the samples and forward
    passes, and all get the same results, bit for bit those of one process.
    """

    trained: Policy
    initial: Policy
    encoder: PairTokenizer
    pairs: Sequence[EncodedPair]
    prompts: Sequence[str]
    prompt_ids: Sequence[Tokens]
    texts: Sequence[tuple[Tokens, Tokens]]
    task: Task | None
    max_new_tokens: int
    tokens: int
    batch_size: int
    seed: int
    context: Callable[[], AbstractContextManager] = nullcontext
    train_pairs: Sequence[EncodedPair] = ()
    pair_sets: Mapping[str, Sequence[SetPair]] = field(default_factory=dict)
    loss: Loss = field(default_factory=DPO)
    reference: ReferenceLogps | None = None
    judge: LoadedJudge | None = None
    cache: Path | None = None
    engine: Engine = field(default_factory=Exact)
    third: ThirdPolicy | None = None
    prompt_file: str = ""
    examples: Examples = field(default_factory=Examples)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sampled response of the trained policy per prompt."""
        return self._sample(self.trained, "trained", self.encoder, self.prompt_ids, "trained")

    @cached_property
    def initial_samples(self) -> list[Sample]:
        """One sampled response of the initial policy per prompt."""
        return self._sample(self.initial, "initial", self.encoder, self.prompt_ids, "initial")

    @cached_property
    def third_samples(self) -> list[Sample]:
        """One sampled response of the third policy per prompt, by the random numbers of the trained policy's."""
        assert self.third is not None
        third = self.third
        return self._sample(third.policy, "third", third.encoder, third.prompt_ids, "trained")

    @cached_property
    def third_responses(self) -> list[str]:
        """The third policy's samples as text."""
        assert self.third is not None
        return [self.third.encoder.text(sample.tokens) for sample in self.third_samples]

    @property
    def side_by_side(self) -> list[dict[str, str]]:
        """Prompts and the policies' responses, as text; empty if no evaluator sampled both policies."""
        if not {"samples", "initial_samples"} <= self.__dict__.keys():
            return []
        columns = {"prompt": self.prompts, "initial": self.responses(self.initial_samples)}
        columns["trained"] = self.responses(self.samples)
        if "third_samples" in self.__dict__:
            columns["third"] = self.third_responses
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def add_texts(self) -> None:
        """Add prompts and responses, as text, to the examples, if both policies were sampled."""
        names = {"prompt": "prompt", "trained": "response", "initial": "initial_response", "third": "third_response"}
        for key, row in zip(self.prompt_keys, self.side_by_side, strict=False):
            self.examples.add("prompt", [key], **{names[name]: [row[name]] for name in names if name in row})

    @cached_property
    def prompt_keys(self) -> list[str]:
        """A key for each prompt: a hash of its token ids, and a number that counts repeats."""
        return numbered(_hash(prompt) for prompt in self.prompt_ids)

    @cached_property
    def text_keys(self) -> list[str]:
        """A key for each text, formed in the same way."""
        return numbered(_hash(prompt, response) for prompt, response in self.texts)

    def responses(self, samples: Sequence[Sample]) -> list[str]:
        """Decode samples to text, without the end token."""
        return [self.encoder.text(s.tokens) for s in samples]

    def complete_texts(self, samples: Sequence[Sample]) -> list[str]:
        """Return prompt and response of each sample as one text."""
        return self.completed(self.responses(samples))

    def completed(self, responses: Sequence[str]) -> list[str]:
        """Return prompt and response as one text, of a response to each prompt."""
        return [p + r for p, r in zip(self.prompts, responses, strict=True)]

    @property
    def gives_rewards(self) -> bool:
        """Whether texts have a reward: the gold one of a task, or a judge's score."""
        return self.task is not None or isinstance(self.judge, Scorer)

    @cached_property
    def rewards(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Rewards of the trained and the initial policy's samples, [N] each, by source: `gold`, `judge`."""
        if not self.gives_rewards:
            return {}
        trained, initial = (
            self.score_texts(self.complete_texts(samples)) for samples in (self.samples, self.initial_samples)
        )
        return {name: (trained[name], initial[name]) for name in trained}

    @cached_property
    def verdicts(self) -> Verdicts | None:
        """The verdicts of a judge that compares on the trained against the initial policy's samples; None without one."""
        if self.judge is None or isinstance(self.judge, Scorer):
            return None
        return self.compared_with(self.responses(self.initial_samples))

    def compared_with(self, responses: Sequence[str]) -> Verdicts | None:
        """Return its verdicts on the trained policy's samples against other responses to the prompts; None without one."""
        if self.judge is None or isinstance(self.judge, Scorer):
            return None
        return self.judge.compare(self.prompts, self.responses(self.samples), responses)

    def candidate_rewards(self, prompts: int, count: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return the keys of the first `prompts` distinct prompts, and the rewards of `count` responses of the initial
        policy to each, [P, count], by source; both are empty without a task and a judge.
        """
        if not self.gives_rewards:
            return [], {}
        first: dict[tuple[int, ...], int] = {}
        for i, prompt in enumerate(self.prompt_ids):
            first.setdefault(tuple(int(token) for token in prompt), i)
        indices = list(first.values())[:prompts]
        responses = candidates(
            self.initial,
            self.encoder,
            [self.prompt_ids[i] for i in indices],
            count,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=derive_seed(self.seed, "evaluation/candidates"),
            context=self.context,
            folder=self.cache,
            engine=self.engine,
        )
        texts = [self.prompts[i] + text for i, own in zip(indices, responses, strict=True) for text in own]
        rewards = {name: values.reshape(len(indices), count) for name, values in self.score_texts(texts).items()}
        return [self.prompt_keys[i] for i in indices], rewards

    def score_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the rewards of texts of prompt and response, [N], by source."""
        rewards: dict[str, np.ndarray] = {}
        if self.task is not None:
            rewards["gold"] = np.array([self.task.gold(text) for text in texts])
        if isinstance(self.judge, Scorer):
            rewards["judge"] = np.asarray(self.judge.score(texts), np.float64)
        return rewards

    @cached_property
    def sample_logps(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (nats) of the trained policy's samples under trained and initial policy, [N] each."""
        policies = (self.trained, self.initial)
        trained, initial = self.logps_under(policies, self.prompt_ids, [s.tokens for s in self.samples])
        return trained, initial

    @cached_property
    def initial_sample_logps(self) -> np.ndarray:
        """Log-probabilities (nats) of the initial policy's samples under itself, [N]."""
        (found,) = self.logps_under([self.initial], self.prompt_ids, [s.tokens for s in self.initial_samples])
        return found

    @cached_property
    def text_logps(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (nats) of the held-out texts under the trained and the initial policy, [N] each."""
        prompts, responses = [prompt for prompt, _ in self.texts], [response for _, response in self.texts]
        trained, initial = self.logps_under((self.trained, self.initial), prompts, responses)
        return trained, initial

    @cached_property
    def held_out(self) -> ScoredPairs:
        """The held-out pairs that have two responses, with their log-probabilities under both policies."""
        return self.held_out_rows.paired

    @cached_property
    def held_out_rows(self) -> ScoredPairs:
        """All held-out pairs, responses labelled on their own included."""
        reference = None
        if self.reference is not None:
            reference = self.logps_of(reference_model(self.reference), self.reference, self.pairs)
        return ScoredPairs(self.pairs, *self.pair_logps, reference)

    @cached_property
    def train(self) -> ScoredPairs:
        """The training pairs that have two responses, with their log-probabilities under both policies."""
        return self.score(self.train_pairs).paired

    @cached_property
    def pair_logps(self) -> tuple[PairLogps, PairLogps]:
        """Log-probabilities of the held-out pairs under the trained and the initial policy."""
        return self._logps_of_pairs(self.pairs)

    def score(self, pairs: Sequence[EncodedPair]) -> ScoredPairs:
        """Return pairs with their log-probabilities under both policies."""
        return ScoredPairs(pairs, *self._logps_of_pairs(pairs))

    def _logps_of_pairs(self, pairs: Sequence[EncodedPair]) -> tuple[PairLogps, PairLogps]:
        trained, initial = (
            self.logps_of(policy.model, partial(pair_logps, policy.model), pairs)
            for policy in (self.trained, self.initial)
        )
        return trained, initial

    def logps_under(
        self, policies: Sequence[Policy], prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> list[np.ndarray]:
        """Return the summed log-probabilities (nats) of responses given their prompts under each policy, [N] each."""
        return [self.response_logps(each.model, prompts, responses)[0].double().numpy() for each in policies]

    def response_logps(
        self, model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed log-probability (nats) of each response given its prompt, and its number of tokens."""
        return score_pairs(model, prompts, responses, self.tokens, self.context)

    def _sample(
        self, policy: Policy, name: str, encoder: PairTokenizer, prompts: Sequence[Tokens], stream: str
    ) -> list[Sample]:
        """Sample a response to each prompt. name: of the policy; stream: of random numbers."""
        request = Request(
            policy,
            encoder,
            prompts,
            max_new_tokens=self.max_new_tokens,
            seed=derive_seed(self.seed, f"evaluation/{stream}"),
            batch_size=self.batch_size,
            what=f"Samples ({name})",
        )
        with self.context(), sampling_explained(self.batch_size, len(request.prompts)):
            return self.engine.generate(request)

    def logps_of(
        self,
        model: PreTrainedModel | None,
        logps_of: Callable[[PairBatch], PairLogps],
        pairs: Sequence[EncodedPair],
    ) -> PairLogps:
        """Return the log-probabilities of pairs by `logps_of`, which runs `model`, in the evaluation's precision."""
        device = device_of(self.trained.model)
        return logps_of_pairs(model, logps_of, pairs, self.tokens, self.context, device)


def _hash(*parts: Tokens) -> str:
    return content_hash([[int(token) for token in part] for part in parts])
