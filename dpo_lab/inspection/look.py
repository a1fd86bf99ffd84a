"""Inspect a run's pairs without the run: their quality, warnings, contradictions, a few pairs token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config.inspection import InspectConfig
from dpo_lab.config.schema import RunConfig
from dpo_lab.data.quality import Quality, quality_of
from dpo_lab.data.sources import Contradictions, Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.tokenized_cache import TokenizedPairs
from dpo_lab.data.warnings import data_warnings
from dpo_lab.inspection.token_view import PairView, view_pair, visible
from dpo_lab.models.policy import Pretrained
from dpo_lab.pipelines.inputs import Forward, encoder_of, load_pairs, policies, tokenizer_of, with_noise
from dpo_lab.training.torch_setup import setup_torch

MAX_SHOWN = 5  # contradictions whose locations are shown


@dataclass(frozen=True)
class Inspection:
    """What an inspection shows. source, tokenizer: names of both; advice: data warnings; contrary: locations of pairs
    that contradict each other; pairs: a few pairs token by token.
    """

    source: str
    tokenizer: str
    quality: Quality
    advice: list[str]
    contrary: list[tuple[str, str]]
    pairs: list[PairView]


@dataclass(frozen=True)
class LoadedPairs:
    """The pairs of a config as training has them, and the store of the user's rows; None for pairs of a task."""

    splits: Splits
    encoder: PairTokenizer
    store: TokenizedPairs | None


def load_pairs_of(config: RunConfig, cache: Path) -> LoadedPairs:
    """Read, split and tokenize the pairs as training would, with label noise.

    Weights are loaded only if the pairs are samples of the policy or the noise depends on its log-probabilities, which
    are computed on the CPU here. Raises ConfigError, BadData and NoTemplate as training would.
    """
    disable_progress_bar()
    setup_torch(config.threads, on_cpu=True)
    if config.data.uses_task:
        config.data.task.check()
    policy = response_policy = store = None
    if config.data.uses_task or config.noise.needs_reference:
        policy, response_policy = policies(config, cache)
    encoder = encoder_of(config, policy.tokenizer if policy else tokenizer_of(config, cache))
    if config.data.uses_task:
        splits = load_pairs(config, encoder, response_policy, cache)
    else:
        store = config.data.store(encoder, cache)
        splits = config.data.choose(store)
    return LoadedPairs(
        with_noise(config, policy, splits, cache, Forward(torch.device("cpu"), nullcontext)), encoder, store
    )


def inspect_pairs(config: InspectConfig, cache: Path) -> Inspection:
    """Load the pairs as training would, but keep pairs that contradict each other, and describe them."""
    if config.data.contradictions is Contradictions.error:
        config = replace(config, data=replace(config.data, contradictions=Contradictions.keep))
    loaded = load_pairs_of(config, cache)
    splits, encoder, store = loaded.splits, loaded.encoder, loaded.store
    source = ", ".join(store.names) if store else f"task {type(config.data.task).__name__.lower()}"
    quality = quality_of(splits.train, splits.held_out, splits.counts, encoder)
    return Inspection(
        source=visible(source, blanks=False),
        tokenizer=visible(
            config.policy.path if isinstance(config.policy, Pretrained) else "the synthetic review task", blanks=False
        ),
        quality=quality,
        advice=[*data_warnings(quality), *_too_few(config, splits)],
        contrary=_contrary(store) if store else [],
        pairs=_pairs(config.show, splits, encoder, store),
    )


def _too_few(config: InspectConfig, splits: Splits) -> Iterator[str]:
    """Yield what a run on so few pairs can't do, with what to type."""
    train, held_out, batch_size = len(splits.train), len(splits.held_out), config.data.batch_size
    if train < batch_size:
        yield (
            f"data.batch_size={batch_size}: a run needs as many training pairs, and here are {train}; type"
            f" data.batch_size={max(1, train)}"
        )
    if not held_out:
        yield (
            f"no pair is held out of {train}: a run has no validation split, so it measures nothing, neither accuracy nor"
            " its interval; give rows of more prompts, or type data.validation_path=FILE.jsonl"
        )


def _contrary(store: TokenizedPairs) -> list[tuple[str, str]]:
    """Return the locations of the first contradictions, each pair once."""
    first = [i for i in np.flatnonzero(store.opposite >= 0).tolist() if i < store.opposite[i]][:MAX_SHOWN]
    places = [(store.where(i), store.where(int(store.opposite[i]))) for i in first]
    return [(visible(a, blanks=False), visible(b, blanks=False)) for a, b in places]


def _pairs(count: int, splits: Splits, encoder: PairTokenizer, store: TokenizedPairs | None) -> list[PairView]:
    """Return views of `count` training pairs, evenly spaced from the first to the last."""
    train = splits.train
    rows = np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)).tolist()
    if store is None:
        return [view_pair(train, i, encoder, f"training pair {i + 1:,}") for i in rows]
    places = [int(np.flatnonzero(store.table.keys == train.keys[i])[0]) for i in rows]
    return [view_pair(train, i, encoder, store.where(at)) for i, at in zip(rows, places, strict=True)]
