"""The inputs of an evaluation: both policies, held-out prompts and texts, a sample of training pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import numpy as np
import torch

from dpo_lab.config.schema import RunConfig
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.formats import Shape
from dpo_lab.data.pair_sets import SetPair, read_pair_set
from dpo_lab.data.splits import HELD_OUT, hash_draws
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.judges import LoadedJudge
from dpo_lab.models.policy import Policy
from dpo_lab.models.sharding import on_device
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, distinct_prompts
from dpo_lab.runs.cache import CACHE


def load_judge(config: RunConfig, device: torch.device) -> LoadedJudge | None:
    """Load the configured judge; None if there is none, or no evaluator that uses it. Raise LabError if that fails, or if
    an evaluator can't run.
    """
    for evaluator in config.evals.selected():
        evaluator.check()
    if not config.evals.uses_judge:
        return None
    return config.evals.judge.load(device, CACHE)


def build_eval_context(
    config: RunConfig,
    inputs: TrainingInputs,
    trained: Policy,
    forward: Forward,
    judge: LoadedJudge | None,
    pair_sets: Mapping[str, Sequence[SetPair]] = MappingProxyType({}),
) -> EvalContext:
    """Return what the evaluators need; prompts and texts come from the task, or from the user's held-out rows.

    Moves both policies to the forward's device.
    """
    for policy in (trained, inputs.initial):
        on_device(policy.model, forward.device)
    encoder, evals = inputs.encoder, config.evals
    if config.data.uses_task:
        task = config.data.task
        prompts = task.prompts(HELD_OUT, evals.num_prompts, config.seed)
        prompt_ids = [encoder.prompt(prompt) for prompt in prompts]
        begin = encoder.prompt("")
        texts = [(begin, encoder.response(text, begin)) for text in task.texts(HELD_OUT, evals.num_texts, config.seed)]
    else:
        task = None
        prompt_ids = distinct_prompts(inputs.held_out)[: evals.num_prompts]
        prompts = [encoder.prompt_text(ids) for ids in prompt_ids]
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
        pair_sets=pair_sets,
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
        seed=config.seed,
    )


def read_pair_sets(config: RunConfig, encoder: PairTokenizer) -> dict[str, list[SetPair]]:
    """Return the pairs of the files that evals.pairs names, read as chat if those of the run are. Raise BadData for a bad
    file.
    """
    shape = Shape(as_chat=config.data.as_chat)
    return {name: read_pair_set(name, path, shape, encoder) for name, path in config.evals.pairs.items()}


def sample_pairs(pairs: PairTable, count: int) -> PairTable:
    """Sample `count` of the pairs, or all, by a hash of their keys.

    The same pairs always give the same sample, and a larger sample contains the smaller ones.
    """
    drawn = np.argsort(hash_draws(pairs.keys, "evaluation"), kind="stable")[:count]
    return pairs.select(np.sort(drawn))
