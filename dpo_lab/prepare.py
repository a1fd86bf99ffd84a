"""What a fit starts from: initial policy, pairs, token ids. Everything costly is made once and kept under the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_lab.config import ConfigError, RunConfig
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.sources import PairSplits
from dpo_lab.data.tokenize import Encoder
from dpo_lab.models.policy import Policy, PolicyError, Pretrained, Start, TinyPolicy, weights_digest
from dpo_lab.models.sampling import respond
from dpo_lab.results.cache import once
from dpo_lab.training.sft import initial_policy

log = logging.getLogger(__name__)


@dataclass
class Material:
    """The initial policy and the pairs in text and token ids; label noise is in `train` and nowhere else."""

    initial: Policy
    encoder: Encoder
    splits: PairSplits
    train: list[EncodedPair]
    held_out: list[EncodedPair]


def prepare(config: RunConfig, cache: Path) -> Material:
    """The material of a run. Raises ConfigError where the pairs can't fill a batch."""
    world = config.data.world
    policy, respondent = _policies(config, cache)
    whole = world.whole or not config.data.is_world
    encoder = Encoder(policy.tokenizer, config.data.max_length, config.data.max_prompt_length, ends=whole)

    def annotated(prompts: Sequence[str], stream: str) -> list[str | None]:
        return responses(respondent, encoder, prompts, world.max_new_tokens, derive_seed(config.seed, stream), cache)

    splits = config.data.load(config.seed, annotated)
    train = encoder.pairs(splits.train, splits.counts)
    held_out = encoder.pairs(splits.held_out, splits.counts)
    train = [pair.flip() if config.noise.flips(pair.key) else pair for pair in train]
    splits.counts["flipped by label noise"] = sum(pair.flipped for pair in train)
    log.info("data: %s", ", ".join(f"{what} {count}" for what, count in splits.counts.items() if count))
    if len(train) < config.data.batch_size:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: only {len(train)} training pairs are there;"
            f" type data.batch_size={max(1, len(train))}"
        )
    return Material(policy, encoder, splits, train, held_out)


def _policies(config: RunConfig, cache: Path) -> tuple[Policy, Policy]:
    """Where training starts, and who writes the responses that the world's annotator is shown.

    The embedded policy's responses are always its SFT'd self's, so that a run from random weights has the same pairs.
    """
    if isinstance(config.policy, Pretrained):
        try:
            policy = respondent = config.policy.load(derive_seed(config.seed, "init"))
        except PolicyError as error:
            raise ConfigError(str(error)) from error
        source = config.policy.path
    else:
        assert isinstance(config.policy, TinyPolicy)
        sft = (config.sft, config.data.world, config.seed, cache)
        policy, source = initial_policy(config.policy, *sft)
        respondent = policy
        if config.policy.start is not Start.sft:
            respondent, _ = initial_policy(replace(config.policy, start=Start.sft), *sft)
    log.info("initial policy: %s, %s parameters", source, f"{policy.model.num_parameters():,}")
    return policy, respondent


def responses(
    policy: Policy, encoder: Encoder, prompts: Sequence[str], max_new_tokens: int, seed: int, cache: Path
) -> list[str | None]:
    """A response of the policy to each prompt, kept by content.

    None where one did not stop by itself; where no response `ends` (see Encoder), None where one did.
    """
    recipe = json.dumps([weights_digest(policy.model), list(prompts), max_new_tokens, seed, encoder.ends, "format 3"])
    digest = hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()

    def make(path: Path) -> None:
        samples = respond(
            policy.model, encoder, prompts, max_new_tokens=max_new_tokens, seed=seed, what="World responses"
        )
        path.write_text(json.dumps([encoder.text(s.tokens) if s.stopped is encoder.ends else None for s in samples]))

    return json.loads(once(cache / f"responses-{digest}.json", make).read_text())
