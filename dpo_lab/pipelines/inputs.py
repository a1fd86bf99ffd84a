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
from transformers.dynamic_module_utils import init_hf_modules

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.quality import Quality, quality_of
from dpo_lab.data.sources import Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import broadcast_object, rank_and_world_size
from dpo_lab.models.decoding import uses_cache
from dpo_lab.models.forward import select_forward
from dpo_lab.models.limits import Limits
from dpo_lab.models.passes import cached_by_ranks
from dpo_lab.models.paths import apply_path, path_of
from dpo_lab.models.policy import Init, Policy, PolicyError, Pretrained, TinyPolicy, weights_digest
from dpo_lab.models.probes import hard_positions
from dpo_lab.models.reference_cache import cached_logps
from dpo_lab.models.sampling import generate_responses
from dpo_lab.models.sharded_weights import from_rank_zero, gathered_as_stored
from dpo_lab.models.sharding import Facts, Sharding, on_device
from dpo_lab.models.trial import compute_dtype
from dpo_lab.pipelines.row_checks import check_pairs, check_responses
from dpo_lab.training.initial_policy import initial_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """The device and the autocast context of forward passes outside of training, and how models are sharded (None: they
    are not): the same as in training.
    """

    device: torch.device
    context: Callable[[], AbstractContextManager]
    sharding: Sharding | None = None


@dataclass
class TrainingInputs:
    """The initial policy, and the training and held-out pairs as token ids; only `train` holds label noise.

    For supervised fine-tuning: chosen responses with their prompts, each once, with empty rejected responses.
    """

    initial: Policy
    encoder: PairTokenizer
    train: PairTable
    held_out: PairTable
    counts: Counter[str]

    def identity(self) -> dict[str, str]:
        """Return hashes of the training and held-out pairs, the tokenizer and the initial policy."""
        return {
            "data": f"{self.train.digest()} {self.held_out.digest()}",
            "tokenizer": self.encoder.fingerprint,
            "initial_policy": weights_digest(self.initial.model),
        }

    def quality(self) -> Quality:
        """Return the data quality of the pairs in numbers."""
        return quality_of(self.train, self.held_out, self.counts, self.encoder)


def prepare_pairs(config: RunConfig, cache: Path, forward: Forward, refusal: str | None = None) -> TrainingInputs:
    """Return the inputs of a run on pairs. Raise ConfigError if the pairs don't fit the model or don't fill a batch.

    refusal: of responses labelled on their own, if not that of the loss, see Loss.refusal.
    """
    policy, response_policy = policies(config, cache, forward.sharding)
    select_on_device(policy, cache, forward)
    encoder = encoder_of(config, policy.tokenizer)
    splits = load_pairs(config, encoder, response_policy, cache)
    splits = check_pairs(config, splits, refusal)
    splits = with_noise(config, policy, splits, cache, forward)
    inputs = TrainingInputs(policy, encoder, splits.train, splits.held_out, splits.counts)
    return _check_inputs(inputs, "pairs", config)


def prepare_responses(config: RunConfig, cache: Path, forward: Forward) -> TrainingInputs:
    """Return the inputs of supervised fine-tuning: the chosen responses of `prepare_pairs`' pairs, or plain texts.

    Raises ConfigError if the responses don't fit the model or don't fill a batch.
    """
    policy, response_policy = policies(config, cache, forward.sharding)
    select_on_device(policy, cache, forward)
    if config.sft.text_column is not None:
        config = replace(config, data=config.data.as_texts(config.sft.text_column))
    encoder = encoder_of(config, policy.tokenizer)
    splits = load_pairs(config, encoder, response_policy, cache)
    check_responses(splits)
    train, held_out, counts = splits.train.chosen_only(), splits.held_out.chosen_only(), splits.counts
    counts["train responses"], counts["held-out responses"] = len(train), len(held_out)
    return _check_inputs(TrainingInputs(policy, encoder, train, held_out, counts), "responses", config)


def _check_inputs(inputs: TrainingInputs, what: str, config: RunConfig) -> TrainingInputs:
    """Log the counts, check that the pairs fit the model and fill a batch, and return the inputs."""
    log.info("data: %s", ", ".join(f"{what} {count:,}" for what, count in inputs.counts.items() if count))
    with policy_errors():
        limits = Limits.of(inputs.initial.model)
        for pairs in (inputs.train, inputs.held_out):
            limits.check_ids(pairs, inputs.initial)
            limits.check_rows(pairs, config.data.max_length)
        if what == "pairs" and config.evals.prompts is None and config.evals.samples:
            prompts = distinct_prompts(inputs.held_out)[: config.evals.num_prompts]
            limits.check_samples(prompts, config.evals.max_new_tokens, "evals.max_new_tokens")
    batch_size = config.data.batch_size
    if (count := len(inputs.train)) < batch_size and not (what == "pairs" and config.method.is_online):
        raise ConfigError(
            f"data.batch_size={batch_size}: only {count} training {what}; type data.batch_size={max(1, count)}"
        )
    return inputs


def encoder_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PairTokenizer:
    """Return the tokenizer of pairs; responses get an end token except where a task generates parts of texts."""
    append_eos = not config.data.uses_task or config.data.task.complete_texts
    return PairTokenizer(tokenizer, config.data.max_length, config.data.max_prompt_length, append_eos)


def load_pairs(config: RunConfig, encoder: PairTokenizer, response_policy: Policy | None, cache: Path) -> Splits:
    """Return training and held-out pairs, without label noise.

    response_policy: the policy that generates the responses of a task; None if the pairs are the user's rows.
    """
    if not config.data.uses_task:
        return config.data.choose(config.data.store(encoder, cache))
    task = config.data.task

    def annotated(prompts: Sequence[str], stream: str) -> list[str | None]:
        assert response_policy is not None
        seed = derive_seed(config.seed, stream)
        with policy_errors():
            limits, ids = Limits.of(response_policy.model), [encoder.prompt(prompt) for prompt in prompts]
            limits.check_samples(ids, task.max_new_tokens, "data.task.max_new_tokens")
        return responses(response_policy, encoder, prompts, task.max_new_tokens, seed, cache)

    return config.data.from_task(config.seed, annotated, encoder)


def with_noise(config: RunConfig, policy: Policy | None, splits: Splits, cache: Path, forward: Forward) -> Splits:
    """Return the splits with label noise in `train`, and count the flipped pairs.

    policy: the initial policy; needed only by noise that depends on the reference's margins.
    """
    margins = None
    if config.noise.needs_reference:
        assert policy is not None
        on_device(policy.model, forward.device)
        reference = cached_logps(policy.model, splits.train, cache, forward.context, config.data.forward_tokens)
        margins = (reference.rows[:, 0] - reference.rows[:, 1]).double().numpy()
    try:
        train = splits.train.flip(config.noise.flips(splits.train, margins))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    splits.counts["flipped by label noise"] = int(train.flipped.sum())
    return replace(splits, train=train)


def select_on_device(policy: Policy, cache: Path, forward: Forward) -> None:
    """Try shared prompts again where and how passes run, unless it was loaded so; all ranks take the path of rank 0.

    A trial in 16 bits tells only large differences from rounding, so it can only take back what one at loading has found.
    A collective: all ranks have to call it. A sharded model keeps the path that was found where rank 0 loaded it.
    """
    if forward.sharding is not None:
        return
    with forward.context():
        is_loaded_so = (forward.device.type, compute_dtype(forward.device)) == ("cpu", torch.float32)
    if not is_loaded_so and path_of(policy.model).shares_prompts:
        select_forward(policy.model, cache, forward.device, forward.context)
    apply_path(policy.model, broadcast_object(path_of(policy.model)))


@contextmanager
def policy_errors() -> Iterator[None]:
    """Raise a PolicyError from inside the context as ConfigError."""
    try:
        yield
    except PolicyError as error:
        raise ConfigError(str(error)) from error


def distinct_prompts(pairs: PairTable) -> list[list[int]]:
    """The prompts of pairs, as token ids, each once, in their order."""
    return list({tuple(pair.prompt): list(pair.prompt) for pair in pairs}.values())


def policies(config: RunConfig, cache: Path, sharding: Sharding | None = None) -> tuple[Policy, Policy]:
    """Return the initial policy, and the policy that generates the responses of a task.

    Where they are sharded over ranks, rank 0 loads them and scatters their weights.
    """
    if sharding is None:
        return _load_policies(config, cache)
    if isinstance(config.policy, Pretrained) and config.policy.trust_remote_code:
        init_hf_modules()  # lets ranks that load nothing import the classes of rank 0's model
    loaded: Sequence[Policy | None] = (None, None)
    refusal: ConfigError | None = None
    if rank_and_world_size()[0] == 0:
        try:
            loaded = _load_policies(config, cache)
        except ConfigError as error:
            refusal = error
    refusal, is_one = broadcast_object((refusal, loaded[0] is loaded[1]))
    if refusal is not None:
        raise refusal
    policy = _shard(loaded[0], sharding)
    response_policy = policy if is_one else _shard(loaded[1], sharding)
    # responses are sampled without autocast, the same in every precision
    return policy, Policy(gathered_as_stored(response_policy.model), response_policy.tokenizer)


def _shard(policy: Policy | None, sharding: Sharding) -> Policy:
    """Return rank 0's policy with its model sharded; other ranks give None."""
    model = facts = None
    if policy is not None:
        model = policy.model
        facts = Facts(weights_digest(model), hard_positions(model))
    tokenizer = broadcast_object(None if policy is None else policy.tokenizer)
    assert tokenizer is not None
    return Policy(from_rank_zero(sharding, model, facts), tokenizer)


def _load_policies(config: RunConfig, cache: Path) -> tuple[Policy, Policy]:
    """Return the policies of `policies`, whole.

    With the embedded policy the one that generates responses is always the fine-tuned one, so that a run from random
    weights has the same pairs.
    """
    if isinstance(config.policy, Pretrained):
        with policy_errors():
            policy = response_policy = config.policy.load(derive_seed(config.seed, "init"), cache)
        source = config.policy.path
    else:
        assert isinstance(config.policy, TinyPolicy)
        sft = (config.sft, config.data.task, config.seed, cache)
        policy, source = initial_policy(config.policy, *sft)
        response_policy = policy
        if config.policy.init is not Init.sft:
            response_policy, _ = initial_policy(replace(config.policy, init=Init.sft), *sft)
    log.info("initial policy: %s, %s parameters", source, f"{policy.model.num_parameters():,}")
    return policy, response_policy


def tokenizer_of(config: RunConfig, cache: Path) -> PreTrainedTokenizerBase:
    """Return the initial policy's tokenizer without loading its weights."""
    if isinstance(config.policy, Pretrained):
        with policy_errors():
            return config.policy.tokenizer()
    assert isinstance(config.policy, TinyPolicy)
    untrained = replace(config.policy, init=Init.random)  # its tokenizer is the same
    return initial_policy(untrained, config.sft, config.data.task, config.seed, cache)[0].tokenizer


def responses(
    policy: Policy, encoder: PairTokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int, cache: Path
) -> list[str | None]:
    """Return one response of the policy per prompt, from the cache if the same ones were generated before.

    A response that did not end with the end token is None; if `encoder.append_eos` is false, one that did end with it.
    """
    recipe = json.dumps(
        [weights_digest(policy.model), list(prompts), max_new_tokens, seed, encoder.append_eos, "format 4"]
    )
    recipe += "" if uses_cache(policy.model) else "without a KV cache"
    digest = hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()

    def make() -> bytes:
        ids = [encoder.prompt(prompt) for prompt in prompts]
        samples = generate_responses(
            policy.model, encoder, ids, max_new_tokens=max_new_tokens, seed=seed, what="Task responses"
        )
        texts = [encoder.text(s.tokens) if s.stopped is encoder.append_eos else None for s in samples]
        return json.dumps(texts).encode()

    return json.loads(cached_by_ranks(cache / f"responses-{digest}.json", make))
