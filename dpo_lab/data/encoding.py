"""Encode chunks of rows to token ids, in order: in this process for few rows, else in several."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from dpo_lab.core.pair_table import flat, scored_of
from dpo_lab.core.pairs import Pair, content_hash
from dpo_lab.data.formats import Shape
from dpo_lab.data.labels import EmptyResponse, NoPair
from dpo_lab.data.messages import content_of
from dpo_lab.data.row_faults import REPEATED
from dpo_lab.data.rows import Chunk, Rows, parse
from dpo_lab.data.splits import split_hash
from dpo_lab.data.tokenize import PairTokenizer

FEWEST_REPEATED = 8  # characters of a prompt; a response may start with a shorter one by chance
MIN_ROWS_FOR_WORKERS = 8  # chunks; for fewer, worker processes are not worth their start

BAD, EMPTY = "dropped: bad row", "dropped: empty response"  # counted where bad rows are skipped

Source = tuple[Rows, Shape]


@dataclass
class Encoded:
    """An encoded chunk: its pairs as columns, counts, and its bad rows as (row number, error, reason to count).

    repeats: number of the first row whose responses both begin with the prompt; 0 without one.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    scored: np.ndarray | None = None  # see PairTable
    lengths: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, "S32"))
    sides: np.ndarray = field(default_factory=lambda: np.empty(0, "S32"))
    splits: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    counts: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)


def text_pairs(sources: Iterable[Source]) -> Iterator[Pair]:
    """Yield the pairs of all rows of the sources as text, in order, without rows that hold none."""
    for rows, shape in sources:
        for row in (row for chunk in rows.chunks() for row in chunk.rows):
            try:
                yield from shape.read(parse(row))
            except (NoPair, ValueError, RecursionError):
                continue


def read_chunk(
    chunk: Chunk, shape: Shape, counts: Counter[str], bad: list[tuple[int, str, str]]
) -> Iterator[tuple[int, Mapping[str, Any], list[Pair]]]:
    """Yield number, row and pairs of each row of a chunk that holds any.

    Adds to `counts` the rows, their faults, and those without a preference; to `bad` those that can't be read, each as
    (row number, error, BAD or EMPTY).
    """
    for number, raw in zip(chunk.numbers, chunk.rows, strict=True):
        counts["rows"] += 1
        try:
            row = parse(raw)
            pairs = shape.read(row, counts)
        except NoPair as reason:
            counts[f"dropped: {reason}"] += 1
        except ValueError as error:
            bad.append((number, str(error), EMPTY if isinstance(error, EmptyResponse) else BAD))
        except RecursionError:
            bad.append((number, "nested too deeply", BAD))
        else:
            yield number, row, pairs


def encode_chunk(chunk: Chunk, shape: Shape, encoder: PairTokenizer) -> Encoded:
    """Read the rows of a chunk as pairs and encode these to token ids."""
    encoded = Encoded()
    counts = encoded.counts
    found: list[tuple[int, Pair]] = []
    for number, _, pairs in read_chunk(chunk, shape, counts, encoded.bad):
        found += [(number, pair) for pair in pairs]
        repeats = sum(repeats_prompt(pair) for pair in pairs)
        if repeats:
            counts[REPEATED] += repeats
            encoded.repeats = encoded.repeats or number
    kept = []
    for (number, pair), (_, ids) in zip(found, _tokenize(found, encoder, encoded), strict=True):
        ids_of_pair = encoder.encode(pair, ids, counts) if ids is not None else None
        if ids_of_pair is not None:
            kept.append((number, pair, ids_of_pair))
    if kept:
        parts = [part for *_, ids in kept for part in (ids.prompt, ids.chosen, ids.rejected)]
        encoded.tokens = flat(parts)
        encoded.scored = scored_of([ids for *_, ids in kept])
        encoded.lengths = np.array([len(part) for part in parts], np.int32).reshape(-1, 3)
        encoded.keys = np.array([pair.key.encode() for _, pair, _ in kept], "S32")
        encoded.sides = np.array([_unordered(pair) for _, pair, _ in kept], "S32")
        encoded.splits = np.array([split_hash(pair.decides_split) for _, pair, _ in kept], np.uint64)
        encoded.scores = np.array([pair.score_margin for _, pair, _ in kept], np.float32)
        encoded.numbers = np.array([number for number, *_ in kept], np.int64)
    return encoded


def _tokenize(found: list[tuple[int, Pair]], encoder: PairTokenizer, encoded: Encoded) -> Iterable[tuple[Pair, Any]]:
    """Return each pair with its token ids, None for a pair whose chat can't be rendered; its row is added to the bad
    ones.
    """
    counts: Counter[str] = Counter()
    try:
        tokenized = encoder.tokenize([pair for _, pair in found], counts)
    except ValueError:
        pass  # tokenize one by one, to find the bad pairs
    else:
        encoded.counts.update(counts)
        return tokenized
    one_by_one: list[tuple[Pair, Any]] = []
    for number, pair in found:
        try:
            one_by_one += encoder.tokenize([pair], encoded.counts)
        except ValueError as error:
            if not encoded.bad or encoded.bad[-1][0] != number:  # unless another pair of this row was bad
                encoded.bad.append((number, str(error), BAD))
            one_by_one.append((pair, None))
    encoded.bad.sort()
    return one_by_one


def encoded_chunks(
    sources: Sequence[Source], encoder: PairTokenizer, workers: int
) -> Iterator[tuple[int, Chunk, Encoded]]:
    """Yield (index of the source, chunk, encoded chunk) of all sources in order; encode many chunks in worker
    processes.
    """
    shapes = [shape for _, shape in sources]
    chunks = ((at, chunk) for at, (rows, _) in enumerate(sources) for chunk in rows.chunks())
    first = list(islice(chunks, MIN_ROWS_FOR_WORKERS))
    if workers <= 1 or len(first) < MIN_ROWS_FOR_WORKERS:
        for part in (first, chunks):
            for at, chunk in part:
                yield at, chunk, encode_chunk(chunk, shapes[at], encoder)
        return
    # spawn: a fork would inherit locks held by threads of torch and of the tokenizer
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (shapes, encoder)) as pool:
        ahead: deque = deque()
        try:
            for part in (first, chunks):
                for at, chunk in part:
                    ahead.append((at, chunk, pool.submit(_work, at, chunk)))
                    if len(ahead) > 3 * workers:
                        at, chunk, future = ahead.popleft()
                        yield at, chunk, future.result()
            for at, chunk, future in ahead:
                yield at, chunk, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(shapes: list[Shape], encoder: PairTokenizer) -> None:
    global _SHAPES, _ENCODER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker process uses one core
    _SHAPES, _ENCODER = shapes, encoder


def _work(at: int, chunk: Chunk) -> Encoded:
    return encode_chunk(chunk, _SHAPES[at], _ENCODER)


def repeats_prompt(pair: Pair) -> bool:
    """Return whether its responses begin with the prompt or, in a chat, with the prompt's last message."""
    prompt, *sides = (content_of(text).strip() for text in (pair.prompt, *pair.responses.values()))
    return len(prompt) >= FEWEST_REPEATED and bool(sides) and all(side.startswith(prompt) for side in sides)


def _unordered(pair: Pair) -> bytes:
    """Return a hash of the prompt and both responses that does not depend on which one is chosen."""
    return content_hash([pair.prompt, sorted([content_hash(pair.chosen), content_hash(pair.rejected)])]).encode()
