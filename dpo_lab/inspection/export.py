"""Export the pairs of a split to a file that other trainers read: text or messages as TRL names them, flips marked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lab.config.inspection import InspectConfig
from dpo_lab.config.schema import ConfigError
from dpo_lab.core.pair_table import PairTable, side_key
from dpo_lab.core.pairs import Pair, Text, Tokens
from dpo_lab.data.encoding import text_pairs
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.inspection.look import LoadedPairs, load_pairs_of

Row = dict[str, Any]


def check_target(path: str | None) -> Path | None:
    """Return the path to export to, None for no export. Raise ConfigError if a file is there already."""
    if path is None:
        return None
    if (file := Path(path)).exists():
        raise ConfigError(f"export={path}: exists already; type another export=, or delete it")
    return file


def export_pairs(config: InspectConfig, cache: Path, file: Path) -> str:
    """Write the pairs of the config's split to a file, and return a line that says how many.

    They are exactly those of a run with this config: selected, deduplicated and with label noise. Raises ConfigError,
    BadData and NoTemplate as training would.
    """
    loaded = load_pairs_of(config, cache)
    table = loaded.splits.train if config.export_split == TRAIN else loaded.splits.held_out
    single = table.is_one_sided
    if single.any() and not single.all():
        raise ConfigError(
            f"export={file}: pairs and rows of one response are mixed in this split, which no format of one file holds; give"
            " the sources one by one"
        )
    rows = list(_rows(table, loaded, config))
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (_write_parquet if file.suffix == ".parquet" else _write_lines)(rows, beside)
        os.replace(beside, file)
    except (OSError, ValueError, TypeError) as error:  # Arrow has no type for values of several types
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise ConfigError(f"export={file}: {why}; type another export=, such as export=pairs.jsonl") from None
    finally:
        beside.unlink(missing_ok=True)
    counts = {"flipped by label noise": "flipped", "truncated in training": "truncated"}
    notes = [f"{n:,} {what}" for what, name in counts.items() if (n := sum(row[name] for row in rows))]
    said = f" ({', '.join(notes)})" if notes else ""
    return f"{file}: {len(rows):,} {config.export_split.value} pairs{said}"


def _rows(table: PairTable, loaded: LoadedPairs, config: InspectConfig) -> Iterator[Row]:
    """Yield a row for each pair of the table, in its order."""
    texts = _decoded(table, loaded.encoder) if loaded.store is None else _read(table, config)
    margins = {
        name: column for name in ("gold_margin", "score_margin") if not np.isnan(column := getattr(table, name)).all()
    }
    cut = _is_truncated(table, loaded.encoder, config.data.max_prompt_length)
    for at, (prompt, chosen, rejected, tools) in enumerate(texts):
        is_flipped, pair = bool(table.flipped[at]), table[at]
        if is_flipped:
            chosen, rejected = rejected, chosen
        parts: Row = {"chosen": chosen, "rejected": rejected}
        ids = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        if table.is_one_sided[at]:
            is_desirable = len(pair.chosen) > 0
            parts = {"completion": chosen if is_desirable else rejected, "label": is_desirable}
            ids = {"completion_ids": pair.chosen if is_desirable else pair.rejected}
        row = {"prompt": prompt, **parts, "key": table.key(at), "flipped": is_flipped, "truncated": bool(cut[at])}
        for name, column in margins.items():
            value = float(column[at])
            row[name] = None if math.isnan(value) else -value if is_flipped else value
        if tools:
            row["tools"] = tools
        if config.export_tokens:
            row |= {name: _ids(side) for name, side in {"prompt_ids": pair.prompt, **ids}.items()}
        yield row


Texts = tuple[Text, Text, Text, list | None]  # prompt, chosen and rejected as annotated, tools


def _decoded(table: PairTable, encoder: PairTokenizer) -> Iterator[Texts]:
    """Yield the texts of a task's pairs, which are those of their tokens."""
    for at in range(len(table)):
        pair = table[at].flip() if table.flipped[at] else table[at]
        yield (
            encoder.prompt_text(_ids(pair.prompt)),
            encoder.text(_ids(pair.chosen)),
            encoder.text(_ids(pair.rejected)),
            None,
        )


def _ids(tokens: Tokens) -> list[int]:
    return np.asarray(tokens).tolist()


def _read(table: PairTable, config: InspectConfig) -> list[Texts]:
    """Return the texts of the user's rows, read once more: the pair of each key of the table."""
    places = {key: at for at, key in enumerate(table.keys.tolist())}
    found: dict[int, Texts] = {}
    for pair in text_pairs(config.data.opened()):
        for key, texts in _keyed(pair, config.data.unpair):
            if (at := places.get(key)) is not None and at not in found:
                found[at] = texts
    if len(found) < len(table):
        raise ConfigError("data: the rows have changed since they were tokenized; type the same command again")
    return [found[at] for at in range(len(table))]


def _keyed(pair: Pair, unpair: bool) -> Iterable[tuple[bytes, Texts]]:
    """Return the rows that a pair may become, by key: itself, or each of its responses, the other side empty."""
    key = pair.key.encode()
    if not unpair or pair.is_single:
        return [(key, (pair.prompt, pair.chosen, pair.rejected, pair.tools))]
    return [
        (side_key(key, 0), (pair.prompt, pair.chosen, "", pair.tools)),
        (side_key(key, 1), (pair.prompt, "", pair.rejected, pair.tools)),
    ]


def _is_truncated(table: PairTable, encoder: PairTokenizer, longest_prompt: int) -> np.ndarray:
    """Return which pairs may be cut in training: a response without its end, or a prompt of the greatest length, [N]."""
    cut = table.lengths[:, 0] >= longest_prompt
    for at in range(len(table)):
        pair = table[at]
        for side in (pair.chosen, pair.rejected):
            if len(side):
                cut[at] |= bool(encoder.is_truncated(len(pair.prompt), len(side), side[-1]))
    return cut


def _write_lines(rows: list[Row], file: Path) -> None:
    with file.open("w") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(rows: list[Row], file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), file)
