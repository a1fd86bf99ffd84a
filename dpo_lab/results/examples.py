"""What a run came to on single pairs: examples.jsonl, one pair a line, to be drawn and compared without the models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXAMPLES = "examples.jsonl"
SPLITS = ("train", "held-out")


class ExamplesError(Exception):
    """The file is damaged; the message names file and line and says what to type."""


@dataclass(frozen=True)
class PairExample:
    """A pair under the trained policy against the initial one, chosen and rejected as they are labelled (after noise).

    key: the pair's, the same in every run; split: one of SPLITS; flipped: label noise swapped its sides; gold_margin: true
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

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: must be one of {', '.join(SPLITS)}")
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        if broken := [name for name, value in numbers.items() if not math.isfinite(value)]:
            raise ValueError(
                f"pair {self.key}: {', '.join(broken)} came out as not finite: something before it is broken"
            )


def write_pairs(path: Path, rows: Iterable[PairExample]) -> None:
    """Write all rows, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    os.replace(beside, path)


def read_pairs(path: Path) -> list[PairExample]:
    """Every row, in order. Raises ExamplesError where a line is not one."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(_row(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ExamplesError(
                    f"{path}:{number}: not a pair of a run ({error}); delete the run's folder and type the same command again"
                ) from None
    return rows


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
_KINDS["float | None"] = (int, float, type(None))


def _row(content: Any) -> PairExample:
    if not isinstance(content, dict):
        raise TypeError("not an object")
    for field in dataclasses.fields(PairExample):
        value, kinds = content.get(field.name), _KINDS[str(field.type)]
        if field.name not in content:
            raise ValueError(f"{field.name} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{field.name}: {value!r}")
    return PairExample(**content)
