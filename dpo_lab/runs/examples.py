"""Per-example values of a run, `examples.jsonl`, for paired tests between runs.

One JSON object a line: `kind` (below), `key`, and one value a column; null where a value is not known. Two runs that were
evaluated on the same examples have the same keys in the same order, so that their columns can be paired line by line.

    held_out, train   a pair; key: the pair's. margin: its log-ratio margin in nats, of the trained to the initial policy,
                      towards chosen; trained_chosen, trained_rejected, initial_chosen, initial_rejected: log-probabilities
                      in nats; gold_margin: the true reward of chosen less that of rejected; flipped: whether label noise
                      swapped the sides; probability: of the label, as the loss gives it (held-out pairs, see
                      evals/calibration.py)
    prompt            a prompt and its samples; key: of its token ids, `#2` behind it where it comes a second time.
                      prompt, response, initial_response: texts; kl: log trained - log initial of the response, nats;
                      tokens, initial_tokens: lengths; gold, initial_gold, judge, initial_judge: rewards; win, judge_win,
                      pairwise_win: 1, 0, or 1/2 for a tie
    candidates        a prompt and many responses of the initial policy; key: the prompt's. gold, judge: a list of their
                      rewards, to four decimals
    text              a held-out text; key: of its token ids. trained, initial: log-probabilities in nats; tokens
    bin               a bin of the reliability curve; key: its lower edge. probability: the mean that was said;
                      frequency: the share of labels that it came true in; share: of all pairs, seen from both sides
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.runs.atomic_write import remove_leftovers, write_atomic

EXAMPLES = "examples.jsonl"


class Examples:
    """Columns of values by kind and key, while they are measured."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)

    def keep(self, kind: str, keys: Sequence[str], **columns: Iterable[Any]) -> None:
        """Add columns, each of one value a key, to the examples of a kind."""
        for name, values in columns.items():
            for key, value in zip(keys, values, strict=True):
                self._rows[kind].setdefault(key, {})[name] = _plain(value)

    def rows(self) -> list[dict[str, Any]]:
        return [{"kind": kind, "key": key} | row for kind, rows in self._rows.items() for key, row in rows.items()]

    def write(self, path: Path) -> None:
        """Commit them, whole or not at all. The caller holds the folder."""
        remove_leftovers(path)
        write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows()))


def read(path: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The examples of a file: kind -> key -> values. Raises ValueError, naming the line, where one can't be read."""
    found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found[row.pop("kind")][row.pop("key")] = row
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: no example ({error}); evaluate the run again") from None
    return dict(found)


@dataclass(frozen=True)
class PairExample:
    """A pair under the trained policy against the initial one, chosen and rejected as they are labelled (after noise).

    key: the pair's, the same in every run; split: train or held-out; flipped: label noise swapped its sides; gold_margin: true
    reward of chosen less that of rejected, None where no truth is known; logp_*: summed log-probability under the trained
    policy, logratio_*: that less the initial policy's, margin: logratio_chosen - logratio_rejected, with what rounding alone
    can explain set to 0, all in nats and without beta; length_*: tokens.
    """

    key: str
    split: str
    flipped: bool
    gold_margin: float | None
    margin: float
    logratio_chosen: float
    logratio_rejected: float
    logp_chosen: float
    logp_rejected: float
    length_chosen: int
    length_rejected: int
    probability: float | None = None  # of the label, under the loss; None: not measured


def pair_examples(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[PairExample]:
    """The pairs among a file's examples: all that are held out, and those that were trained on."""
    return [
        PairExample(
            key=key,
            split=split,
            flipped=row["flipped"],
            gold_margin=row["gold_margin"],
            margin=row["margin"],
            logratio_chosen=row["trained_chosen"] - row["initial_chosen"],
            logratio_rejected=row["trained_rejected"] - row["initial_rejected"],
            logp_chosen=row["trained_chosen"],
            logp_rejected=row["trained_rejected"],
            length_chosen=row["chosen_length"],
            length_rejected=row["rejected_length"],
            probability=row.get("probability"),
        )
        for kind, split in (("held_out", "held-out"), ("train", "train"))
        for key, row in found.get(kind, {}).items()
    ]


def numbered(keys: Iterable[str]) -> list[str]:
    """The same keys, each told apart: `#2` behind one that comes a second time."""
    seen: Counter[str] = Counter()
    told = []
    for key in keys:
        seen[key] += 1
        told.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return told


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
