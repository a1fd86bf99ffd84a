"""The evidence for findings: a run's record and metrics log as values over known numbers of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z = 3.0  # standard errors: rules look many times, at many figures, and speak only of what is certain
# Losses whose log-ratios are of whole responses, in nats; those that beta has no say in.
SUMMED = ("dpo", "cdpo", "rdpo", "ipo", "hinge", "sft", "unlikelihood", "rpo", "dpop", "dpo_kl")
WITHOUT_BETA = ("sft", "unlikelihood")


@dataclass(frozen=True)
class Row:
    """Mean figures over `pairs` pairs: of training those of the steps since the row before, up to `step`."""

    step: int
    pairs: int
    figures: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.figures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.figures


@dataclass(frozen=True)
class Bounds:
    """A figure and where it certainly lies."""

    value: float
    low: float
    high: float


class Evidence:
    """One run, as far as it has come.

    record: as in run.json, `metrics` only of a run that was evaluated; rows: of its journal, in order. train, val: rows whose
    names lost their `train/` or `val/`.
    """

    def __init__(self, record: Mapping[str, Any], rows: Iterable[Mapping[str, float]]) -> None:
        self.record, self.config = record, record["config"]
        counts = record.get("data", {})
        self.batch: int = self.config["data"]["batch_size"]
        self.steps: int = self.config["trainer"]["max_steps"]
        self.train_pairs: int = counts.get("train pairs", 0)
        self.held_out_pairs: int | None = counts.get("held-out pairs")
        self.flips: int = counts.get("flipped by label noise", 0)
        self.loss: str | None = self.config.get("loss", {}).get("kind")  # none: supervised fine-tuning
        self.train: list[Row] = []
        self.val: list[Row] = []
        for row in rows:
            self._take(row)

    def _take(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        if of_train := _of(row, "train/"):
            before = self.train[-1].step if self.train else 0
            self.train.append(Row(step, (step - before) * self.batch, of_train))
        if of_val := _of(row, "val/"):
            self.val.append(Row(step, self.held_out_pairs or 0, of_val))

    @property
    def step(self) -> int:
        """Optimizer steps done at the last row."""
        return max((rows[-1].step for rows in (self.train, self.val) if rows), default=0)

    @property
    def zero(self) -> float | None:
        """The loss where policy and reference agree; none where the policy does not start there."""
        return self.record.get("step_zero_loss")

    @property
    def start(self) -> float | None:
        """The loss that training starts from; without a reference that agrees with the policy that of the first row."""
        if self.zero is not None:
            return self.zero
        return self.train[0]["loss"] if self.train else None

    @property
    def epochs(self) -> float:
        """How often a training pair has been seen."""
        return self.step * self.batch / self.train_pairs if self.train_pairs else 0.0

    def lately(self, pairs: int, until: int | None = None) -> Row | None:
        """The mean of as few rows of training, up to step `until`, as hold `pairs` pairs; none where they hold fewer.

        Only what all of these rows have is in it.
        """
        rows = [row for row in self.train if until is None or row.step <= until]
        taken: list[Row] = []
        while rows and sum(row.pairs for row in taken) < pairs:
            taken.append(rows.pop())
        total = sum(row.pairs for row in taken)
        if not taken or total < pairs:
            return None
        names = set.intersection(*(set(row.figures) for row in taken))
        means = {name: math.fsum(row[name] * row.pairs for row in taken) / total for name in names}
        return Row(taken[0].step, total, means)

    def metric(self, name: str) -> Bounds | None:
        """A metric of the evaluation, none where it was not measured or its interval is not known."""
        found = self.record.get("metrics", {}).get(name)
        if found is None or found["interval"] is None:
            return None
        return Bounds(found["value"], *found["interval"])


def wilson_interval(p: float, n: float) -> Bounds:
    """Where a share lies that came out as p of n: Wilson's interval at Z standard errors."""
    n = max(n, 1)
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return Bounds(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def at_no_margin(loss: Mapping[str, Any]) -> float | None:
    """What a loss is at a margin of 0 (DPO: ln 2), none where the margin alone does not tell. loss: its settings and `kind`."""
    kind = loss["kind"]
    if kind in ("dpo", "cdpo", "rdpo"):
        return math.log(2)
    if kind in ("ipo", "ipo_mean"):
        return (1 / (2 * loss["beta"])) ** 2
    return 1.0 if kind == "hinge" else None


def lowest(rows: Sequence[Row], name: str) -> Row:
    """The row where a figure is lowest, the first of several."""
    return min(rows, key=lambda row: row[name])


def _of(row: Mapping[str, float], split: str) -> dict[str, float]:
    return {name.removeprefix(split): value for name, value in row.items() if name.startswith(split)}
