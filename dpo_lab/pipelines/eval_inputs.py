"""The inputs of an evaluation: the policies, held-out prompts and texts, further files, a sample of training pairs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import Tokens
from dpo_lab.data.formats import Shape
from dpo_lab.data.pair_sets import SetPair, read_pair_set
from dpo_lab.data.prompt_file import FilePrompts, read_prompts
from dpo_lab.data.rows import BadData
from dpo_lab.data.splits import HELD_OUT, hash_draws
from dpo_lab.data.tasks.base import Task
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluate import policy_folder
from dpo_lab.evals.judges import LoadedJudge
from dpo_lab.evals.third_policy import ThirdPolicy
from dpo_lab.models.limits import Limits
from dpo_lab.models.policy import Policy, Pretrained, weights_digest
from dpo_lab.models.sharding import on_device
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, distinct_prompts, policy_errors, select_on_device
from dpo_lab.pipelines.trained_policy import load_trained
from dpo_lab.runs.cache import CACHE

log = logging.getLogger(__name__)


def load_judge(config: RunConfig, device: torch.device) -> LoadedJudge | None:
    """Load the configured judge; None if there is none, or no evaluator that uses it. Raise LabError if that fails."""
    return config.evals.judge.load(device, CACHE) if config.evals.uses_judge else None


@dataclass(frozen=True)
class EvalInputs:
    """What an evaluation reads besides the inputs of its run: the files that evals.pairs, evals.prompts and evals.third
    name.
    """

    pair_sets: Mapping[str, Sequence[SetPair]] = field(default_factory=dict)
    prompts: FilePrompts | None = None
    third: ThirdPolicy | None = None

    def record(self) -> dict[str, Any]:
        """Return what is recorded of the prompts and of the third policy, by content, so that runs are compared by it."""
        found: dict[str, Any] = {}
        if self.prompts is not None:
            found["prompts"] = {"sha256": self.prompts.sha256, "count": len(self.prompts)}
        if self.third is not None:
            found["third"] = {"weights": weights_digest(self.third.policy.model)}
        return found


def read_eval_inputs(config: RunConfig, inputs: TrainingInputs, forward: Forward) -> EvalInputs:
    """Read the files of an evaluation, and load its third policy. Raise BadData or ConfigError, each with what to type."""
    data, evals, encoder = config.data, config.evals, inputs.encoder
    shape = Shape(as_chat=data.as_chat)
    pair_sets = {name: read_pair_set(name, path, shape, encoder) for name, path in evals.pairs.items()}
    prompts = None if evals.prompts is None else read_prompts(evals.prompts, data.as_chat, evals.num_prompts)
    if prompts is not None:
        _check_lengths(prompts, encoder, inputs.initial, evals.max_new_tokens)
    third = None
    if evals.third is not None:
        try:
            third = _load_third(config, evals.third, inputs, prompts, forward)
        except (BadData, ConfigError) as error:
            raise ConfigError(f"evals.third={evals.third}: {error}") from error
    return EvalInputs(pair_sets, prompts, third)


def _load_third(
    config: RunConfig, path: str, inputs: TrainingInputs, given: FilePrompts | None, forward: Forward
) -> ThirdPolicy:
    """Load the third policy, and encode the prompts by its own tokenizer.

    Raises ConfigError if the prompts don't fit it, or if they are chats of which only the tokens are kept, and its
    tokenizer has another vocabulary.
    """
    settings = replace(config.policy, chat_template=None) if isinstance(config.policy, Pretrained) else config.policy
    policy = load_trained(settings, policy_folder(path))
    select_on_device(policy, CACHE, forward)
    encoder, (prompts, ids) = inputs.encoder, eval_prompts(config, inputs, given)[1:]
    own, ours = replace(encoder, tokenizer=policy.tokenizer), encoder.tokenizer
    same_vocabulary = own.tokenizer.get_vocab() == ours.get_vocab()
    if same_vocabulary and not own.tokenizer.chat_template:  # type: ignore[attr-defined]
        own.tokenizer.chat_template = ours.chat_template  # type: ignore[attr-defined]
    own_ids = ids
    if given is not None:
        own_ids = given.encode(own)
    elif not same_vocabulary:
        of_templates = encoder.special_ids - encoder.unknown_ids - set(encoder.prompt(""))
        if any(not of_templates.isdisjoint(encoder.prompt(text)) for text in prompts):
            raise ConfigError(
                "its tokenizer is another one, and the prompts of the data are rendered as chats for that of the initial"
                " policy; type evals.prompts=FILE of prompts as messages with it"
            )
        own_ids = [own.prompt(text) for text in prompts]
    with policy_errors():
        Limits.of(policy.model).check_samples(own_ids, config.evals.max_new_tokens, "evals.max_new_tokens")
    shares_tokens = same_vocabulary and own_ids == ids
    if not shares_tokens:
        log.warning("evals.third: its tokens differ from the initial policy's, so its KL to that is not measured")
    return ThirdPolicy(policy, own, own_ids, shares_tokens)


def _check_lengths(prompts: FilePrompts, encoder: PairTokenizer, policy: Policy, new_tokens: int) -> None:
    """Raise ConfigError if a sample after a prompt has more tokens than the policy has positions; warn of prompts with
    characters that its tokenizer does not know.
    """
    limits, encoded = Limits.of(policy.model), prompts.encode(encoder)
    if unknown := sum(not encoder.unknown_ids.isdisjoint(ids) for ids in encoded):
        log.warning(
            "evals.prompts: %d of %d prompts have characters that the tokenizer does not know", unknown, len(encoded)
        )
    with policy_errors():
        for place, ids in zip(prompts.places, encoded, strict=True):
            what = f"{place}: the prompt, of {len(ids):,} tokens, with evals.max_new_tokens={new_tokens}"
            limits.check_length(len(ids) + new_tokens, what, "shorten the prompt or lower evals.max_new_tokens")


def build_eval_context(
    config: RunConfig,
    inputs: TrainingInputs,
    trained: Policy,
    forward: Forward,
    judge: LoadedJudge | None,
    more: EvalInputs = EvalInputs(),
) -> EvalContext:
    """Return what the evaluators need; prompts and texts come from the task, or from the user's held-out rows; prompts from
    evals.prompts, if it is set.

    Moves the policies to the forward's device.
    """
    for policy in (trained, inputs.initial, *([more.third.policy] if more.third is not None else [])):
        on_device(policy.model, forward.device)
    encoder, evals = inputs.encoder, config.evals
    task, prompts, prompt_ids = eval_prompts(config, inputs, more.prompts)
    if task is not None:
        begin = encoder.prompt("")
        texts = [(begin, encoder.response(text, begin)) for text in task.texts(HELD_OUT, evals.num_texts, config.seed)]
    else:
        chosen = ((pair.prompt, pair.chosen) for pair in inputs.held_out if len(pair.chosen))
        texts = list(islice(chosen, evals.num_texts))
    reference, tokens = None, config.data.forward_tokens
    if not config.reference.starts_at_policy:
        pairs = inputs.train.concat(inputs.held_out)  # as in training, whose cache is found
        reference = config.reference.prepare(inputs.initial.model, pairs, CACHE, forward.context, tokens)
    return EvalContext(
        trained=trained,
        initial=inputs.initial,
        encoder=encoder,
        pairs=inputs.held_out.with_responses(),
        pair_sets=more.pair_sets,
        train_pairs=sample_pairs(inputs.train.with_responses(), evals.num_train_pairs),
        prompts=prompts,
        prompt_ids=prompt_ids,
        texts=texts,
        task=task,
        max_new_tokens=evals.max_new_tokens,
        tokens=tokens,
        batch_size=evals.batch_size,
        context=forward.context,
        loss=config.loss,
        reference=reference,
        judge=judge,
        cache=CACHE,
        engine=evals.engine,
        third=more.third,
        prompt_file="" if more.prompts is None else more.prompts.name,
        seed=config.seed,
    )


def eval_prompts(
    config: RunConfig, inputs: TrainingInputs, given: FilePrompts | None = None
) -> tuple[Task | None, Sequence[str], Sequence[Tokens]]:
    """Return the task if there is one, and the prompts to sample from, as text and as token ids.

    given: prompts of a file, in place of those of the task or of the held-out pairs.
    """
    encoder, count = inputs.encoder, config.evals.num_prompts
    task = config.data.task if config.data.uses_task else None
    if given is None and task is not None:
        prompts = task.prompts(HELD_OUT, count, config.seed)
        return task, prompts, [encoder.prompt(prompt) for prompt in prompts]
    prompt_ids: Any = distinct_prompts(inputs.held_out)[:count] if given is None else given.encode(encoder)
    return task, [encoder.prompt_text(ids) for ids in prompt_ids], prompt_ids


def sample_pairs(pairs: PairTable, count: int) -> PairTable:
    """Sample `count` of the pairs, or all, by a hash of their keys.

    The same pairs always give the same sample, and a larger sample contains the smaller ones.
    """
    drawn = np.argsort(hash_draws(pairs.keys, "evaluation"), kind="stable")[:count]
    return pairs.select(np.sort(drawn))
