"""The inputs of a run: initial policy, pairs and token ids; everything costly is cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.quality import Quality, quality_of
from dpo_lab.data.sources import Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.limits import Limits
from dpo_lab.models.policy import Init, Policy, PolicyError, Pretrained, TinyPolicy, weights_digest
from dpo_lab.models.reference_cache import cached_logps
from dpo_lab.models.sampling import generate_responses
from dpo_lab.runs.cache import cached
from dpo_lab.training.initial_policy import initial_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """What a model computes on, and under which autocast, before it trains: as it will when it trains."""

    device: torch.device
    context: Callable[[], AbstractContextManager]


@dataclass
class TrainingInputs:
    """The initial policy and the pairs as token ids; label noise is in `train` and nowhere else.

    Of supervised fine-tuning: chosen responses to their prompts, each once, with nothing rejected.
    """

    initial: Policy
    encoder: PairTokenizer
    train: PairTable
    held_out: PairTable
    counts: Counter[str]

    def identity(self) -> dict[str, str]:
        """Hashes of all that training starts from: the pairs, train and held-out, the tokenizer, the initial policy."""
        return {
            "data": f"{self.train.digest()} {self.held_out.digest()}",
            "tokenizer": self.encoder.fingerprint,
            "initial_policy": weights_digest(self.initial.model),
        }

    def quality(self) -> Quality:
        return quality_of(self.train, self.held_out, self.counts, self.encoder)


def prepare_pairs(config: RunConfig, cache: Path, forward: Forward) -> TrainingInputs:
    """The material of a run. Raises ConfigError where the pairs can't fill a batch."""
    policy, respondent = policies(config, cache)
    encoder = encoder_of(config, policy.tokenizer)
    splits = with_noise(config, policy, load_pairs(config, encoder, respondent, cache), cache, forward)
    material = TrainingInputs(policy, encoder, splits.train, splits.held_out, splits.counts)
    return _checked(material, "pairs", config)


def prepare_responses(config: RunConfig, cache: Path) -> TrainingInputs:
    """The material of supervised fine-tuning: the chosen responses of the very pairs that `prepare` gives, or whole texts.

    Raises ConfigError where the responses can't fill a batch.
    """
    policy, respondent = policies(config, cache)
    if config.sft.text_column is not None:
        config = replace(config, data=config.data.as_texts(config.sft.text_column))
    encoder = encoder_of(config, policy.tokenizer)
    splits = load_pairs(config, encoder, respondent, cache)
    train, held_out, counts = splits.train.chosen_alone(), splits.held_out.chosen_alone(), splits.counts
    counts["train responses"], counts["held-out responses"] = len(train), len(held_out)
    return _checked(TrainingInputs(policy, encoder, train, held_out, counts), "responses", config)


def _checked(material: TrainingInputs, what: str, config: RunConfig) -> TrainingInputs:
    """The material, said in the log, whose pairs fit the model."""
    log.info("data: %s", ", ".join(f"{what} {count:,}" for what, count in material.counts.items() if count))
    with policy_errors():
        limits = Limits.of(material.initial.model)
        for pairs in (material.train, material.held_out):
            limits.check_ids(pairs, material.initial)
            limits.check_rows(pairs, config.data.max_length)
        if what == "pairs" and config.evals.samples_responses:
            prompts = distinct_prompts(material.held_out)[: config.evals.samples]
            limits.check_samples(prompts, config.evals.max_new_tokens, "evals.max_new_tokens")
    batch_size = config.data.batch_size
    if (count := len(material.train)) < batch_size:
        raise ConfigError(
            f"data.batch_size={batch_size}: only {count} training {what} are there; type data.batch_size={max(1, count)}"
        )
    return material


def encoder_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PairTokenizer:
    ends = not config.data.is_world or config.data.world.whole
    return PairTokenizer(tokenizer, config.data.max_length, config.data.max_prompt_length, ends)


def load_pairs(config: RunConfig, encoder: PairTokenizer, respondent: Policy | None, cache: Path) -> Splits:
    """Train and held-out pairs as annotated. respondent: who writes the responses of a world; rows of the user's need none."""
    if not config.data.is_world:
        return config.data.choose(config.data.store(encoder, cache))
    world = config.data.world

    def annotated(prompts: Sequence[str], stream: str) -> list[str | None]:
        assert respondent is not None
        seed = derive_seed(config.seed, stream)
        with policy_errors():
            limits, ids = Limits.of(respondent.model), [encoder.prompt(prompt) for prompt in prompts]
            limits.check_samples(ids, world.max_new_tokens, "data.world.max_new_tokens")
        return responses(respondent, encoder, prompts, world.max_new_tokens, seed, cache)

    return config.data.from_world(config.seed, annotated, encoder)


def with_noise(config: RunConfig, policy: Policy | None, splits: Splits, cache: Path, forward: Forward) -> Splits:
    """The same with label noise in `train`, and counted. policy: needed where the noise looks at the reference."""
    margins = None
    if config.noise.needs_reference:
        assert policy is not None
        policy.model.to(forward.device)  # type: ignore[arg-type]
        reference = cached_logps(policy.model, splits.train, cache, forward.context, config.data.tokens_per_microbatch)
        margins = (reference.rows[:, 0] - reference.rows[:, 1]).double().numpy()
    try:
        train = splits.train.flip(config.noise.flips(splits.train, margins))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    splits.counts["flipped by label noise"] = int(train.flipped.sum())
    return replace(splits, train=train)


@contextmanager
def policy_errors() -> Iterator[None]:
    """What a model can't do is a setting that can't be."""
    try:
        yield
    except PolicyError as error:
        raise ConfigError(str(error)) from error


def distinct_prompts(pairs: PairTable) -> list[list[int]]:
    """The prompts of pairs, as token ids, each once, in their order."""
    return list({tuple(pair.prompt): list(pair.prompt) for pair in pairs}.values())


def policies(config: RunConfig, cache: Path) -> tuple[Policy, Policy]:
    """Where training starts, and who writes the responses that the world's annotator is shown.

    The embedded policy's responses are always its SFT'd self's, so that a run from random weights has the same pairs.
    """
    if isinstance(config.policy, Pretrained):
        with policy_errors():
            policy = respondent = config.policy.load(derive_seed(config.seed, "init"), cache)
        source = config.policy.path
    else:
        assert isinstance(config.policy, TinyPolicy)
        sft = (config.sft, config.data.world, config.seed, cache)
        policy, source = initial_policy(config.policy, *sft)
        respondent = policy
        if config.policy.start is not Init.sft:
            respondent, _ = initial_policy(replace(config.policy, start=Init.sft), *sft)
    log.info("initial policy: %s, %s parameters", source, f"{policy.model.num_parameters():,}")
    return policy, respondent


def tokenizer_of(config: RunConfig, cache: Path) -> PreTrainedTokenizerBase:
    """The initial policy's tokenizer, without its weights."""
    if isinstance(config.policy, Pretrained):
        with policy_errors():
            return config.policy.tokenizer()
    assert isinstance(config.policy, TinyPolicy)
    untrained = replace(config.policy, start=Init.random)  # its tokenizer is the same
    return initial_policy(untrained, config.sft, config.data.world, config.seed, cache)[0].tokenizer


def responses(
    policy: Policy, encoder: PairTokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int, cache: Path
) -> list[str | None]:
    """A response of the policy to each prompt, kept by content.

    None where one did not stop by itself; where no response `ends` (see PairTokenizer), None where one did.
    """
    recipe = json.dumps([weights_digest(policy.model), list(prompts), max_new_tokens, seed, encoder.ends, "format 4"])
    recipe += "" if uses_cache(policy.model) else "without a KV cache"
    digest = hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()

    def make(path: Path) -> None:
        ids = [encoder.prompt(prompt) for prompt in prompts]
        samples = generate_responses(
            policy.model, encoder, ids, max_new_tokens=max_new_tokens, seed=seed, what="World responses"
        )
        path.write_text(json.dumps([encoder.text(s.tokens) if s.stopped is encoder.ends else None for s in samples]))

    return json.loads(cached(cache / f"responses-{digest}.json", make).read_text())
