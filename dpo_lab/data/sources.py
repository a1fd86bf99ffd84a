"""Data sources: a task, files, or data sets of the hub; which rows are read, which train, and how they are mixed."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

import numpy as np

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import Pair
from dpo_lab.data.formats import Format, Shape
from dpo_lab.data.row_faults import Contradictions, OnBadRow
from dpo_lab.data.rows import BadData, Rows, local_files, open_rows
from dpo_lab.data.splits import HELD_OUT, TRAIN, below_fraction, hash_draws
from dpo_lab.data.tasks.base import Task
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.tokenized_cache import BadRows, TokenizedPairs, load_or_build
from dpo_lab.errors import check_at_least

log = logging.getLogger(__name__)

AUTO, FORWARD_TOKENS = "auto", 2048  # the word for tokens that a trial finds, and the default

Sampler = Callable[[Sequence[str], str], Sequence[str | None]]


@dataclass
class Splits:
    """Training and held-out pairs as token ids; counts of rows; the first unpaired row, and the first prompt alone."""

    train: PairTable
    held_out: PairTable
    counts: Counter[str]
    unpaired: str = ""
    prompt_alone: str = ""


@dataclass
class Source(Shape):
    """A source of the user's rows, and how they are read.

    path: a file, a pattern, a list of these (JSONL, JSON, Parquet, CSV, Arrow; gzip, zstd, bzip2, xz), a folder that
    `datasets` can read, or a name on the hub, with name (of its configuration), split and revision. weight: its
    relative weight in a mixture of sources.
    """

    path: Any = None  # a string or a list of strings
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.weight={self.weight}: must be above 0; type e.g. weight: 1")

    def rows(self) -> Rows:
        """Open the source; raise BadData if it does not exist."""
        return open_rows(self.path, self.name, self.split, self.revision)


@dataclass
class Data(Source):
    """Settings of the pairs and their batches: pairs of one source, of several sources mixed by weight, or of a task.

    validation_path, validation_split: the source of held-out pairs; without them validation_fraction of all pairs is
    held out, by a hash of the prompt. At most validation_pairs are held out. fraction: share of the training pairs to
    use; a smaller one is a subset of a larger. unpair: train on the two responses of each pair as two rows of one
    labelled response; held-out pairs stay pairs. batch_size: pairs per optimizer step, over all devices;
    tokens_per_microbatch: the most tokens per forward pass (a pair of more tokens is a micro-batch of its own), in
    training and evaluation: memory depends on it, results do not. tokenize_workers: processes that read and tokenize many rows;
    None for one per core.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    validation_path: Any = None
    validation_split: str | None = None
    validation_fraction: float = 0.1
    validation_pairs: int = 512
    fraction: float = 1.0
    unpair: bool = False
    on_bad_row: OnBadRow = OnBadRow.error
    max_bad_share: float = 0.1
    contradictions: Contradictions = Contradictions.error
    pairs: int = 4000
    max_length: int = 512
    max_prompt_length: int = 256
    batch_size: int = 32
    tokens_per_microbatch: Union[int, str] = FORWARD_TOKENS  # noqa: UP007  # OmegaConf reads no other union
    num_workers: int = 0
    tokenize_workers: int | None = None
    task: Task = field(default_factory=SyntheticReviews)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources and self.path:
            raise ValueError("data.path and data.sources: rows come from one or the other; type data=mix")
        if self.sources and self.validation_split and not self.validation_path:
            raise ValueError("data.validation_split: data.sources has no split; type data.validation_path= too")
        if not self.sources and self.path is not None and not self.path:
            raise ValueError(
                "data.path is empty; type data.path=FILE.jsonl, data=mix '+data.sources={a: {path: FILE.jsonl}, ...}',"
                " or data=embedded for the synthetic reviews"
            )
        if missing := [name for name, source in self.sources.items() if not source.path]:
            raise ValueError(
                f"data.sources.{missing[0]}.path is missing; type +data.sources.{missing[0]}.path=FILE.jsonl"
            )
        tokens = self.tokens_per_microbatch
        if tokens != AUTO and (isinstance(tokens, str) or tokens < 1):
            raise ValueError(
                f"data.tokens_per_microbatch={tokens}: must be 1 or more, or auto; type e.g."
                f" data.tokens_per_microbatch={FORWARD_TOKENS}"
            )
        for name in ("pairs", "validation_pairs", "batch_size"):
            check_at_least(f"data.{name}", getattr(self, name), 1, 32)
        check_at_least("data.num_workers", self.num_workers, 0, 0)
        if self.tokenize_workers is not None:
            check_at_least("data.tokenize_workers", self.tokenize_workers, 1, 4)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1;"
                " type e.g. data.validation_fraction=0.1"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction={self.fraction}: must lie in (0, 1]; type e.g. data.fraction=0.5")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                f"data.max_bad_share={self.max_bad_share}: must lie in [0, 1]; type e.g. data.max_bad_share=0.1"
            )
        if not 2 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length}: must lie between 2 and"
                f" data.max_length={self.max_length}, to leave room for responses;"
                " type e.g. data.max_length=512 data.max_prompt_length=256"
            )

    @property
    def forward_tokens(self) -> int:
        """The most tokens of passes outside of training, whose size no trial finds."""
        return FORWARD_TOKENS if isinstance(self.tokens_per_microbatch, str) else self.tokens_per_microbatch

    @property
    def uses_task(self) -> bool:
        """Whether the pairs come from a task, where the gold reward is known."""
        return self.path is None and not self.sources

    @property
    def has_texts(self) -> bool:
        """Whether some rows are texts without a preference."""
        return any(source.format is Format.text for source in self._sources())

    def files(self) -> list[Path]:
        """Return the local files that rows are read from."""
        sources = [] if self.uses_task else [*self._held_out_sources(), *self._sources()]
        return sorted({file for source in sources for file in local_files(source.path)})

    def as_texts(self, column: str) -> Data:
        """Return the same settings with rows read as texts without a prompt."""
        shape: dict[str, Any] = {"format": Format.text, "columns": {"text": column}}
        sources = {name: replace(source, **shape) for name, source in self.sources.items()}
        return replace(self, sources=sources, **shape)

    def from_task(self, seed: int, sample: Sampler, encoder: PairTokenizer) -> Splits:
        """Return the pairs of the task, whose prompts belong to one split each. sample: samples responses, see
        Task.pairs.
        """
        counts: Counter[str] = Counter()
        tables: dict[str, PairTable] = {}
        for split, count in ((TRAIN, self.pairs), (HELD_OUT, self.validation_pairs)):
            drawn: dict[str, Pair] = {}
            for item in self.task.pairs(split, count, seed, sample):
                counts["rows"] += 1
                if isinstance(item, str):
                    counts[f"dropped: {item}"] += 1
                elif item.key in drawn:
                    counts["dropped: duplicate"] += 1
                else:
                    drawn[item.key] = item
            tables[split] = PairTable.of(encoder.pairs(drawn.values(), counts))
        train = tables[TRAIN]
        if self.fraction < 1:
            train = train.select(self._fraction(train, counts))
        return self._checked(self._unpaired(Splits(train, tables[HELD_OUT], counts)), "the task")

    def opened(self) -> list[tuple[Rows, Source]]:
        """Open the sources of the user's rows, those of held-out pairs first."""
        return [(source.rows(), source) for source in [*self._held_out_sources(), *self._sources()]]

    def store(self, encoder: PairTokenizer, cache: Path) -> TokenizedPairs:
        """Return all pairs of the user's rows, before any are selected; raise BadData for bad rows."""
        sources = self.opened()
        workers = self.tokenize_workers or len(os.sched_getaffinity(0))
        return load_or_build(
            sources, encoder, BadRows(self.on_bad_row is OnBadRow.skip, self.max_bad_share), workers, cache
        )

    def choose(self, store: TokenizedPairs) -> Splits:
        """Select training and held-out pairs, with no prompt in both; raise BadData if a split is empty, or if pairs
        contradict each other and that is not allowed.
        """
        counts = Counter(store.counts)
        kept = self._without_contradictions(store, counts) & self._mixed(store, counts)
        held_out_sources = len(self._held_out_sources())
        if held_out_sources:
            held_out = kept & (store.sources < held_out_sources)
            leaking = kept & (store.sources >= held_out_sources) & np.isin(store.splits, store.splits[held_out])
            counts["dropped: prompt is held out"] = int(leaking.sum())
            train = kept & ~held_out & ~leaking
        else:
            held_out = kept & below_fraction(store.splits, self.validation_fraction)
            if (held_out == kept).all():  # with few rows the hash may leave none for training
                held_out[:] = False
            train = kept & ~held_out
        train[train] = self._fraction(store.table.select(train), counts)
        chosen = np.flatnonzero(held_out)
        if len(chosen) > self.validation_pairs:
            counts["left out: more held-out pairs than data.validation_pairs"] = len(chosen) - self.validation_pairs
            first = np.argsort(hash_draws(store.table.keys[chosen], "held-out"), kind="stable")[: self.validation_pairs]
            chosen = np.sort(chosen[first])
        unpaired = store.first(store.table.is_one_sided & ~store.table.is_prompt, "is one response with a label")
        alone = store.first(store.table.is_prompt, "is a prompt alone")
        splits = self._unpaired(Splits(store.table.select(train), store.table.select(chosen), counts, unpaired, alone))
        if not held_out_sources and not len(chosen):
            log.warning("data: no pair is held out, so nothing can be measured; type data.validation_path=FILE.jsonl")
            return self._checked(splits, ", ".join(store.names), needed=("train",))
        return self._checked(splits, ", ".join(store.names))

    def _sources(self) -> list[Source]:
        return list(self.sources.values()) or [self]

    def _held_out_sources(self) -> list[Source]:
        if self.validation_path is None and self.validation_split is None:
            return []
        shape = {spec: getattr(self, spec) for spec in ("format", "columns", "pick", "label_is", "as_chat")}
        path = self.path if self.validation_path is None else self.validation_path
        return [Source(**shape, path=path, name=self.name, split=self.validation_split, revision=self.revision)]

    def _without_contradictions(self, store: TokenizedPairs, counts: Counter[str]) -> np.ndarray:
        contradicted = store.opposite >= 0
        counts["contradictions"] = int(contradicted.sum()) // 2
        if counts["contradictions"] and self.contradictions is Contradictions.error:
            first = int(np.flatnonzero(contradicted)[0])
            raise BadData(
                f"{store.where(first)} and {store.where(int(store.opposite[first]))} contradict each other"
                f" ({counts['contradictions']:,} such contradictions); type data.contradictions=drop to leave both out,"
                " or data.contradictions=keep"
            )
        if self.contradictions is Contradictions.drop:
            counts["dropped: contradiction"] = int(contradicted.sum())
            return ~contradicted
        return np.ones(len(contradicted), bool)

    def _mixed(self, store: TokenizedPairs, counts: Counter[str]) -> np.ndarray:
        """Return which pairs to keep so that sources are mixed by weight; of one source all pairs are kept."""
        if len(self.sources) < 2:
            return np.ones(len(store.table), bool)
        first = len(self._held_out_sources())
        available = np.bincount(store.sources, minlength=first + len(self.sources))[first:]
        wanted = np.array([source.weight for source in self.sources.values()]) / np.maximum(1, available)
        fractions = np.concatenate([np.ones(first), wanted / wanted[available > 0].max(initial=1e-300)])
        draws = hash_draws(store.table.keys, "mixture")
        kept = np.zeros(len(draws), bool)
        for source, fraction in enumerate(fractions):
            kept |= (store.sources == source) & below_fraction(draws, fraction)
        counts["left out: by the sources' weights"] = int((~kept).sum())
        return kept

    def _fraction(self, table: PairTable, counts: Counter[str]) -> np.ndarray:
        if self.fraction >= 1:
            return np.ones(len(table), bool)
        kept = below_fraction(hash_draws(table.keys, "fraction"), self.fraction)
        counts["left out: by data.fraction"] = int((~kept).sum())
        return kept

    def _unpaired(self, splits: Splits) -> Splits:
        """Return the splits with each training pair as two rows of one response, if `unpair` is set."""
        if not self.unpair:
            return splits
        splits.counts["training pairs split in two"] = int((~splits.train.is_one_sided).sum())
        return replace(splits, train=splits.train.unpair(), unpaired="data.unpair=true splits pairs in two")

    def _checked(self, splits: Splits, what: str, needed: Sequence[str] = ("train", "held-out")) -> Splits:
        for name, table in (("train", splits.train), ("held-out", splits.held_out)):
            splits.counts[f"{name} pairs"] = len(table)
            if not len(table) and name in needed:
                found = ", ".join(f"{name} {count:,}" for name, count in splits.counts.items() if count)
                raise BadData(
                    f"{what}: no {name} pair is left of {found}; type a {'smaller' if name == 'train' else 'larger'}"
                    " data.validation_fraction, or give more rows"
                )
        return splits
