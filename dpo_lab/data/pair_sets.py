"""Read further preference files for evaluation: pairs with the subset that each row names, as token ids and as text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lab.core.pairs import EncodedPair, Pair, Text
from dpo_lab.data.encoding import BAD, read_chunk
from dpo_lab.data.formats import Shape
from dpo_lab.data.messages import content_of
from dpo_lab.data.rows import BadData, open_rows
from dpo_lab.data.tokenize import PairTokenizer

log = logging.getLogger(__name__)

SUBSET = "subset"  # the column of a row's subset, as in RewardBench


@dataclass(frozen=True)
class SetPair:
    """A pair of a set: as token ids; prompt, chosen and rejected as text, for judges; the subset of its row, or ""."""

    encoded: EncodedPair
    texts: tuple[str, str, str]
    subset: str = ""


def read_pair_set(name: str, path: str, shape: Shape, encoder: PairTokenizer) -> list[SetPair]:
    """Return the distinct pairs of a preference file, or of several, in their order.

    Rows are of any format with two responses that data.path takes. Raises BadData for a row that is not one, or if no pair
    is left, with location and what to type.
    """
    key, counts = f"evals.pairs.{name}={path}", Counter[str]()
    try:
        every = list(_pairs(path, shape, counts))
    except BadData as error:
        raise BadData(str(error).replace("data.path=", f"evals.pairs.{name}=")) from None
    found = {pair.key: (pair, subset) for pair, subset in every}
    counts["dropped: duplicate"] += len(every) - len(found)
    pairs = [pair for pair, _ in found.values()]
    try:
        tokenized = encoder.tokenize(pairs, counts)
    except ValueError as error:
        raise BadData(f"{key}: {error}") from None
    kept = []
    for (pair, ids), (_, subset) in zip(tokenized, found.values(), strict=True):
        if (encoded := encoder.encode(pair, ids, counts)) is not None:
            kept.append(SetPair(encoded, (as_text(pair.prompt), as_text(pair.chosen), as_text(pair.rejected)), subset))
    if not kept:
        raise BadData(f"{key}: holds no pair; type the path of a file of rows with prompt, chosen and rejected")
    if dropped := {reason: count for reason, count in counts.items() if reason.startswith("dropped") and count}:
        log.warning("%s: %s", key, ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()))
    return kept


def _pairs(path: str, shape: Shape, counts: Counter[str]) -> Iterator[tuple[Pair, str]]:
    for chunk in open_rows(path, None, None, None).chunks():
        bad: list[tuple[int, str, str]] = []
        for number, row, pairs in read_chunk(chunk, shape, counts, bad):
            for pair in pairs:
                if pair.is_single:
                    bad.append((number, "is one response with a label, not a pair", BAD))
                yield pair, str(row.get(SUBSET) or "")
        for number, error, reason in bad:
            if reason == BAD:
                raise BadData(f"{chunk.place}:{number}: {error}; fix the row, which evals.pairs reads")
            counts[reason] += 1


def as_text(text: Text) -> str:
    """Return a text, or what the messages of a chat say: of one message its content, of several with their roles."""
    if isinstance(text, str) or len(text) == 1:
        return content_of(text)
    return "\n\n".join(f"{message['role']}: {content_of([message])}" for message in text)
