"""Per-example values of a run, `examples.jsonl`, for paired tests between runs.

One JSON object per line: `kind` (below), `key`, and one value per column; null if a value is not known. Two runs that
were evaluated on the same examples have the same keys in the same order, so that their columns can be paired line by
line.

    held_out, train   a pair; key: the pair's. margin: its log-ratio margin in nats, trained minus initial policy,
                      chosen minus rejected; trained_chosen, trained_rejected, initial_chosen, initial_rejected:
                      log-probabilities in nats; gold_margin: the true reward of chosen minus that of rejected; flipped:
                      whether label noise swapped the sides; probability: of the label under the loss (held-out pairs,
                      see evals/evaluators/calibration.py)
    response          a held-out response that was labelled on its own; key: the row's. desirable: its label; trained,
                      initial: log-probabilities in nats; tokens
    prompt            a prompt and its samples; key: a hash of its token ids, with `#2` appended if it occurs again.
                      prompt, response, initial_response: texts; kl: log trained - log initial of the response, nats;
                      tokens, initial_tokens: lengths; gold, initial_gold, judge, initial_judge: rewards; win,
                      judge_win: 1, 0, or 1/2 for a tie; third_response, third/...: of a third policy, evals.third, and
                      of the trained one against it; judge_first, judge_undecided, judge_unanswered: see
                      evals/judges/base.py
    pair_set          a pair of a further file, evals.pairs; key: the file's name and the pair's key. subset; accuracy,
                      policy_accuracy, initial/policy_accuracy, longer, judge_accuracy: 1, 0, or 1/2 for a tie;
                      judge_first and the other columns of the judge as above
    candidates        a prompt and many responses of the initial policy; key: the prompt's. gold, judge: a list of their
                      rewards, rounded to four decimals
    harness           an item of a benchmark; key: its task and number. A column for each metric, and initial_METRIC
    text              a held-out text; key: a hash of its token ids. trained, initial: log-probabilities in nats; tokens
    bin               a bin of the reliability curve; key: its lower edge. probability: the mean predicted one;
                      frequency: the share of labels that are right; share: of all pairs, counted from both sides
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.errors import LabError
from dpo_lab.runs.atomic_write import remove_leftovers, write_atomic

EXAMPLES = "examples.jsonl"


class ExamplesError(LabError, ValueError):
    """Raised where a line of a file of examples can't be read; the message names it and says what to type."""


class Examples:
    """The values of the examples by kind and key, collected during an evaluation."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)

    def add(self, kind: str, keys: Sequence[str], **columns: Iterable[Any]) -> None:
        """Add columns, each with one value per key, to the examples of a kind."""
        for name, values in columns.items():
            for key, value in zip(keys, values, strict=True):
                self._rows[kind].setdefault(key, {})[name] = _to_json(value)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per example."""
        return [{"kind": kind, "key": key} | row for kind, rows in self._rows.items() for key, row in rows.items()]

    def write(self, path: Path) -> None:
        """Write the rows to a file atomically. The caller has to hold a lock on the folder."""
        remove_leftovers(path)
        write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows()))


def read(path: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Read a file of examples: kind -> key -> values. Raise ExamplesError, naming the line, if one can't be read."""
    found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows_of(path):
        found[row.pop("kind")][row.pop("key")] = row
    return dict(found)


def rows_of(path: Path, start: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of examples whose lines start with `start`. Raise ExamplesError for one that is none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.startswith(start):
                continue
            try:
                row = json.loads(line)
                if not {"kind", "key"} <= row.keys():
                    raise ValueError("kind or key is missing")
            except (ValueError, AttributeError) as error:
                raise ExamplesError(f"{path}:{number}: not an example ({error}); evaluate the run again") from None
            yield row


@dataclass(frozen=True)
class PairExample:
    """A pair under the trained and the initial policy; chosen and rejected as labelled, after label noise.

    key: the pair's, the same in every run; split: train or held-out; flipped: whether label noise swapped its sides;
    gold_margin: true reward of chosen minus that of rejected, None if it is not known; logp_*: summed log-probability
    under the trained policy; logratio_*: the same minus the initial policy's; margin: logratio_chosen -
    logratio_rejected, set to 0 if rounding alone can explain it; all in nats and without beta; length_*: in tokens.
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
    probability: float | None = None  # of the label under the loss; None: not measured


def pair_examples(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[PairExample]:
    """Return the pairs among a file's examples, held-out ones first, then training pairs."""
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
    """Return the keys made unique: `#2` is appended to one that occurs a second time."""
    seen: Counter[str] = Counter()
    unique = []
    for key in keys:
        seen[key] += 1
        unique.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return unique


def _to_json(value: Any) -> Any:
    """Convert a value to one that JSON has: NaN and infinities become None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
