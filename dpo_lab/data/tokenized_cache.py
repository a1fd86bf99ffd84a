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
from dpo_lab.data.encoding import Source, encoded_chunks
from dpo_lab.data.formats import Shape
from dpo_lab.data.row_faults import REPEATED
from dpo_lab.data.rows import BadData
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.runs.cache import cached
from dpo_lab.terminal.progress import track

log = logging.getLogger(__name__)

FORMAT = "4"  # to be raised whenever what a store holds would change
SAID = 5  # bad rows that are shown
MOST_REPEATED = 0.5  # of the pairs; that many can't all begin their answers with the prompt by chance


@dataclass(frozen=True)
class BadRows:
    """What to do with rows that are no pair: skip them, as long as they are at most this share of all, or stop at the
    first.
    """

    skip: bool
    most: float


@dataclass(frozen=True)
class TokenizedPairs:
    """All pairs of some sources, each once, in order.

    splits [N]: the hash of the prompt that decides on its split; sources [N]: which source a pair is of; places [N] and
    numbers [N]: where its row stands, see `where`; opposite [N]: the pair that says the contrary, -1 where none does;
    counts: rows, and what became of those that are no pair here.
    """

    table: PairTable
    splits: np.ndarray
    sources: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    opposite: np.ndarray
    names: list[str]
    counts: Counter[str]

    def where(self, at: int) -> str:
        return f"{self.names[self.places[at]]}:{self.numbers[at]}"


def load_or_build(
    sources: Sequence[Source], encoder: PairTokenizer, bad: BadRows, workers: int, cache: Path
) -> TokenizedPairs:
    """The store of these sources under this encoder, from the cache or made and put there.

    Raises BadData at a bad row or where too many are bad.
    """
    content = [(rows.digest(), _recipe(shape)) for rows, shape in sources]
    recipe = content_hash([content, encoder.fingerprint, bad.skip, bad.most, FORMAT])
    return _open(cached(cache / f"pairs-{recipe[:16]}", lambda folder: _build(folder, sources, encoder, bad, workers)))


def _build(folder: Path, sources: Sequence[Source], encoder: PairTokenizer, bad: BadRows, workers: int) -> None:
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    repeats = ""  # where a row stands whose sides both begin with the prompt
    names: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    with track("Pairs", 100) as advance, (folder / "tokens.bin").open("wb") as file:
        total = sum(rows.total for rows, _ in sources)
        for at, chunk, encoded in encoded_chunks(sources, encoder, workers):
            if encoded.bad and not bad.skip:
                number, what = encoded.bad[0]
                raise BadData(
                    f"{chunk.place}:{number}: {what}; mend the row, or type data.on_bad_row=skip to leave such rows out"
                )
            counts += encoded.counts
            if encoded.repeats and not repeats:
                repeats = f"{chunk.place}:{encoded.repeats}"
            counts["dropped: bad row"] += len(encoded.bad)
            wrong += [f"{chunk.place}:{number}: {what}" for number, what in encoded.bad[: SAID - len(wrong)]]
            if chunk.place not in names:
                names.append(chunk.place)
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
    _say(wrong, counts, bad)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not columns or not len(columns["keys"]):
        raise BadData(
            f"{', '.join(names) or 'data.path'}: no pair is left of {_plainly(counts)}; look at what was dropped,"
            " and mend the file or type another data.path="
        )
    if counts[REPEATED] > MOST_REPEATED * (pairs := len(columns["keys"])):
        raise BadData(
            f"{repeats}: both sides begin with the prompt, as in {counts[REPEATED]:,} of {pairs:,} pairs: it would be there"
            " twice; leave it out of both sides, or leave out the prompt's column (what both sides share is the prompt then)"
        )
    columns = _drop_repeats(columns, counts)
    save_file({name: _without_text(column) for name, column in columns.items()}, folder / "columns.safetensors")
    (folder / "store.json").write_text(json.dumps({"names": names, "counts": dict(counts)}, indent=1))


def _drop_repeats(columns: dict[str, np.ndarray], counts: Counter[str]) -> dict[str, np.ndarray]:
    """The columns without repeated pairs, with where each pair's tokens start, and which pair says the contrary."""
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


def _say(wrong: Sequence[str], counts: Counter[str], bad: BadRows) -> None:
    """Show the first bad rows. Raises BadData where too many are bad."""
    found, rows = counts["dropped: bad row"], counts["rows"]
    for line in wrong:
        log.warning("bad row: %s", line)
    if found > len(wrong):
        log.warning("bad rows: %s more of that kind", f"{found - len(wrong):,}")
    if found > bad.most * rows:
        raise BadData(
            f"{found:,} of {rows:,} rows are bad, more than data.max_bad_share={bad.most:g} (the first: {wrong[0]}); mend them,"
            " or type a larger data.max_bad_share="
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
    )
    rest = {name: columns[name] for name in ("splits", "sources", "places", "numbers", "opposite")}
    return TokenizedPairs(table, **rest, names=record["names"], counts=Counter(record["counts"]))


def _recipe(shape: Shape) -> dict[str, Any]:
    values = {spec.name: getattr(shape, spec.name) for spec in fields(Shape)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _without_text(column: np.ndarray) -> np.ndarray:
    """Bytes as numbers: safetensors knows no text."""
    return column.view(np.uint8).reshape(len(column), -1) if column.dtype.kind == "S" else column


def _plainly(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counts.items() if count) or "0 rows"
