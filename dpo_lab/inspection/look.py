"""Inspect a run's pairs without the run: their quality, warnings, contradictions, a few pairs token by token."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config.schema import InspectConfig
from dpo_lab.data.quality import Quality, quality_of
from dpo_lab.data.sources import Contradictions, Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.tokenized_cache import TokenizedPairs
from dpo_lab.data.warnings import data_warnings
from dpo_lab.inspection.token_view import PairView, view_pair, visible
from dpo_lab.models.policy import Pretrained
from dpo_lab.pipelines.inputs import Forward, encoder_of, load_pairs, policies, tokenizer_of, with_noise
from dpo_lab.training.torch_setup import setup_torch

SAID = 5  # contradictions whose places are shown


@dataclass(frozen=True)
class Inspection:
    """What there is to see. source, tokenizer: what was looked at; contrary: places of pairs that contradict each other."""

    source: str
    tokenizer: str
    quality: Quality
    advice: list[str]
    contrary: list[tuple[str, str]]
    pairs: list[PairView]


def inspect_pairs(config: InspectConfig, cache: Path) -> Inspection:
    """Read, split and tokenise the pairs as training would, but go on where they contradict each other.

    Weights are loaded only where the pairs are the policy's own samples or the noise looks at its log-probabilities, which
    are computed on the CPU here. Raises ConfigError, BadData and NoTemplate as training would.
    """
    disable_progress_bar()
    setup_torch(config.threads, on_cpu=True)
    if config.data.contradictions is Contradictions.error:
        config = replace(config, data=replace(config.data, contradictions=Contradictions.keep))
    if config.data.is_world:
        config.data.world.check()
    policy = respondent = store = None
    if config.data.is_world or config.noise.needs_reference:
        policy, respondent = policies(config, cache)
    encoder = encoder_of(config, policy.tokenizer if policy else tokenizer_of(config, cache))
    if config.data.is_world:
        splits = load_pairs(config, encoder, respondent, cache)
        source = f"the world {type(config.data.world).__name__.lower()}"
    else:
        store = config.data.store(encoder, cache)
        splits, source = config.data.choose(store), ", ".join(store.names)
    splits = with_noise(config, policy, splits, cache, Forward(torch.device("cpu"), nullcontext))
    quality = quality_of(splits.train, splits.held_out, splits.counts, encoder)
    return Inspection(
        source=visible(source, blanks=False),
        tokenizer=visible(config.policy.path if isinstance(config.policy, Pretrained) else "embedded", blanks=False),
        quality=quality,
        advice=data_warnings(quality),
        contrary=_contrary(store) if store else [],
        pairs=_pairs(config.show, splits, encoder, store),
    )


def _contrary(store: TokenizedPairs) -> list[tuple[str, str]]:
    """The places of the first contradictions, each named once."""
    first = [i for i in np.flatnonzero(store.opposite >= 0).tolist() if i < store.opposite[i]][:SAID]
    places = [(store.where(i), store.where(int(store.opposite[i]))) for i in first]
    return [(visible(a, blanks=False), visible(b, blanks=False)) for a, b in places]


def _pairs(count: int, splits: Splits, encoder: PairTokenizer, store: TokenizedPairs | None) -> list[PairView]:
    """So many training pairs, from the first to the last at equal steps."""
    train = splits.train
    rows = np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)).tolist()
    if store is None:
        return [view_pair(train, i, encoder, f"training pair {i + 1:,}") for i in rows]
    places = [int(np.flatnonzero(store.table.keys == train.keys[i])[0]) for i in rows]
    return [view_pair(train, i, encoder, store.where(at)) for i, at in zip(rows, places, strict=True)]
