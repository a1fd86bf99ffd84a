"""The cache of tokenized pairs: built once on all cores, keyed by content, and memory-mapped."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dpo_lab.core.pair_table import PairTable, starts_of
from dpo_lab.core.pairs import content_hash
from dpo_lab.data.encoding import BAD, EMPTY, Source, encoded_chunks
from dpo_lab.data.formats import Shape
from dpo_lab.data.row_faults import REPEATED
from dpo_lab.data.rows import BadData
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.runs.cache import cached
from dpo_lab.terminal.progress import track

log = logging.getLogger(__name__)

FORMAT = "5"  # increase it when a change of the code changes the cached content
SCORED = "scored.bin"  # which tokens are scored, where not all are
SHOWN = 5  # bad rows to show
MOST_REPEATED = 0.5  # share of pairs; above it responses do not repeat the prompt by chance


@dataclass(frozen=True)
class BadRows:
    """What to do with bad rows: skip them, up to the share `most` of all rows, or raise an error at the first."""

    skip: bool
    most: float


@dataclass(frozen=True)
class TokenizedPairs:
    """All distinct pairs of some sources, in order.

    splits [N]: the hash of the prompt that decides the split; sources [N]: the index of the source; places [N] and
    numbers [N]: the location of the row, see `where`; opposite [N]: the index of the contradicting pair, -1 without
    one; counts: the number of rows, and of dropped ones by reason.
    """

    table: PairTable
    splits: np.ndarray
    sources: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    opposite: np.ndarray
    names: list[str]
    counts: Counter[str]

    def first(self, mask: np.ndarray, what: str) -> str:
        """Return the location of the first pair that the mask [N] holds, and `what` it is; empty if it holds none."""
        return f"{self.where(int(mask.argmax()))} {what}" if mask.any() else ""

    def where(self, at: int) -> str:
        """Return the location of a pair's row, as file:line."""
        return f"{self.names[self.places[at]]}:{self.numbers[at]}"


def load_or_build(
    sources: Sequence[Source], encoder: PairTokenizer, bad: BadRows, workers: int, cache: Path
) -> TokenizedPairs:
    """Return the tokenized pairs of these sources, from the cache or computed and stored there.

    Raises BadData at a bad row or, if bad rows are skipped, if there are too many.
    """
    content = [(rows.digest(), _settings(shape)) for rows, shape in sources]
    key = content_hash([content, encoder.fingerprint, bad.skip, bad.most, FORMAT])
    return _open(cached(cache / f"pairs-{key[:16]}", lambda folder: _build(folder, sources, encoder, bad, workers)))


def _build(folder: Path, sources: Sequence[Source], encoder: PairTokenizer, bad: BadRows, workers: int) -> None:
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    shown: list[str] = []
    repeats = ""  # location of the first row whose responses both begin with the prompt
    names: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    masks: list[
        tuple[int, np.ndarray | None]
    ] = []  # of each chunk: its tokens, and which of them are scored if not all
    with track("Pairs", 100) as advance, (folder / "tokens.bin").open("wb") as file:
        total = sum(rows.total for rows, _ in sources)
        for at, chunk, encoded in encoded_chunks(sources, encoder, workers):
            if encoded.bad and not bad.skip:
                number, what, _ = encoded.bad[0]
                raise BadData(
                    f"{chunk.place}:{number}: {what}; fix the row, or type data.on_bad_row=skip to leave such rows out"
                )
            counts += encoded.counts
            if encoded.repeats and not repeats:
                repeats = f"{chunk.place}:{encoded.repeats}"
            counts.update(reason for *_, reason in encoded.bad)
            shown += [f"{chunk.place}:{number}: {what}" for number, what, _ in encoded.bad[: SHOWN - len(shown)]]
            if chunk.place not in names:
                names.append(chunk.place)
            masks.append((len(encoded.tokens), encoded.scored))
            file.write(encoded.tokens.tobytes())
            parts.append(
                {
                    "lengths": encoded.lengths,
                    "keys": encoded.keys,
                    "sides": encoded.sides,
                    "splits": encoded.splits,
                    "scores": encoded.scores,
                    "numbers": encoded.numbers,
                    "sources": np.full(len(encoded.keys), at, np.int16),
                    "places": np.full(len(encoded.keys), names.index(chunk.place), np.int32),
                }
            )
            advance(100 * chunk.amount / max(1, total), [f"{counts['rows']:,} rows"])
    _report_bad_rows(shown, counts, bad)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not columns or not len(columns["keys"]):
        raise BadData(
            f"{', '.join(names) or 'data.path'}: no pair is left of {_format_counts(counts)}; look at what was dropped,"
            " and fix the file or type another data.path="
        )
    if counts[REPEATED] > MOST_REPEATED * (pairs := len(columns["keys"])):
        raise BadData(
            f"{repeats}: both sides begin with the prompt, as in {counts[REPEATED]:,} of {pairs:,} pairs: it would be"
            " repeated; leave it out of both sides, or leave out the prompt's column (then their common beginning is the"
            " prompt)"
        )
    columns = _drop_repeats(columns, counts)
    if any(scored is not None for _, scored in masks):
        every = [np.ones(size, bool) if scored is None else scored for size, scored in masks]
        (folder / SCORED).write_bytes(np.concatenate(every).tobytes())
    save_file({name: _without_text(column) for name, column in columns.items()}, folder / "columns.safetensors")
    (folder / "store.json").write_text(json.dumps({"names": names, "counts": dict(counts)}, indent=1))


def _drop_repeats(columns: dict[str, np.ndarray], counts: Counter[str]) -> dict[str, np.ndarray]:
    """Remove repeated pairs; add the columns `starts` and `opposite`, the index of the contradicting pair."""
    columns["starts"] = starts_of(columns["lengths"])
    _, first = np.unique(columns["keys"], return_index=True)
    counts["dropped: duplicate"] += len(columns["keys"]) - len(first)
    first.sort()
    columns = {name: column[first] for name, column in columns.items()}
    order = np.argsort(columns["sides"], kind="stable")
    ordered = columns.pop("sides")[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    opposite = np.full(len(order), -1, np.int64)
    opposite[order[twice]], opposite[order[twice + 1]] = order[twice + 1], order[twice]
    return columns | {"opposite": opposite}


def _report_bad_rows(shown: Sequence[str], counts: Counter[str], bad: BadRows) -> None:
    """Log the first bad rows; raise BadData if there are too many."""
    found, rows = counts[BAD] + counts[EMPTY], counts["rows"]
    for line in shown:
        log.warning("bad row: %s", line)
    if found > len(shown):
        log.warning("bad rows: %s more", f"{found - len(shown):,}")
    if found > bad.most * rows:
        raise BadData(
            f"{found:,} of {rows:,} rows are bad, more than data.max_bad_share={bad.most:g} (the first: {shown[0]});"
            " fix them, or type a larger data.max_bad_share="
        )


def _open(folder: Path) -> TokenizedPairs:
    record = json.loads((folder / "store.json").read_text())
    columns = load_file(folder / "columns.safetensors")
    table = PairTable(
        keys=columns["keys"].view("S32")[:, 0],
        tokens=np.memmap(folder / "tokens.bin", np.int32, "r"),
        starts=columns["starts"],
        lengths=columns["lengths"],
        gold_margin=np.full(len(columns["keys"]), np.nan, np.float32),
        score_margin=columns["scores"],
        flipped=np.zeros(len(columns["keys"]), bool),
        scored=np.memmap(folder / SCORED, np.bool_, "r") if (folder / SCORED).exists() else None,
    )
    rest = {name: columns[name] for name in ("splits", "sources", "places", "numbers", "opposite")}
    return TokenizedPairs(table, **rest, names=record["names"], counts=Counter(record["counts"]))


def _settings(shape: Shape) -> dict[str, Any]:
    values = {spec.name: getattr(shape, spec.name) for spec in fields(Shape)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _without_text(column: np.ndarray) -> np.ndarray:
    """View a column of bytes as numbers, since safetensors has no dtype for text."""
    return column.view(np.uint8).reshape(len(column), -1) if column.dtype.kind == "S" else column


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counts.items() if count) or "0 rows"
