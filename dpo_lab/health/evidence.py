"""The evidence for findings: a run's record and metrics log as values over known numbers of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lab.stats.estimates import wilson

Z = 3.0  # standard errors: rules test many values many times and report only what is certain


@dataclass(frozen=True)
class Row:
    """Mean values over `pairs` pairs; a training row covers the steps after the previous row up to `step`."""

    step: int
    pairs: int
    figures: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.figures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.figures


@dataclass(frozen=True)
class Bounds:
    """A value and its interval."""

    value: float
    low: float
    high: float


class Evidence:
    """The record and the metrics log of one run, which may still be training.

    record: as in run.json, with `metrics` once the run was evaluated; rows: of its metrics log, in order. train, val:
    the rows of each split, their names without `train/` or `val/`. batch: pairs of a step; of a method that samples, prompts.
    """

    def __init__(self, record: Mapping[str, Any], rows: Iterable[Mapping[str, float]]) -> None:
        self.record, self.config = record, record["config"]
        counts = record.get("data", {})
        method = self.config.get("method", {})
        self.is_online = "samples" in method
        online_batch = method["prompts"] // method["minibatches"] if self.is_online else 0
        self.batch: int = online_batch or self.config["data"]["batch_size"]
        self.steps: int = self.config["trainer"]["max_steps"]
        self.train_pairs: int = counts.get("train pairs", 0)
        self.held_out_pairs: int | None = counts.get("held-out pairs")
        self.flips: int = counts.get("flipped by label noise", 0)
        self.loss_traits = loss_traits(record)
        self.train: list[Row] = []
        self.val: list[Row] = []
        for row in rows:
            self._add(row)

    def _add(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        if train := _of(row, "train/"):
            before = self.train[-1].step if self.train else 0
            self.train.append(Row(step, (step - before) * self.batch, train))
        if val := _of(row, "val/"):
            self.val.append(Row(step, self.held_out_pairs or 0, val))

    @property
    def step(self) -> int:
        """Return the optimizer steps done at the last row."""
        return max((rows[-1].step for rows in (self.train, self.val) if rows), default=0)

    @property
    def step_zero_loss(self) -> float | None:
        """Return the loss where policy and reference agree; None if they do not agree initially."""
        return self.record.get("step_zero_loss")

    @property
    def initial_loss(self) -> float | None:
        """Return the loss at step 0; if policy and reference do not agree there, the loss of the first row."""
        if self.step_zero_loss is not None:
            return self.step_zero_loss
        return self.train[0].figures.get("loss") if self.train else None

    @property
    def epochs(self) -> float:
        """Return how often each training pair was seen; 0 if the policy samples what it trains on."""
        return 0.0 if self.is_online else self.step * self.batch / max(1, self.train_pairs)

    def recent_mean(self, pairs: int, until: int | None = None) -> Row | None:
        """Return the mean of the last training rows, up to step `until`, that together cover `pairs` pairs; None if
        there are fewer pairs. It holds the metrics that all of these rows have.
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

    def metric(self, name: str, of: str = "") -> Bounds | None:
        """Return a metric of the evaluation; None if it was not measured or has no interval.

        of: the entry of the record that holds `metrics`, by default the record itself.
        """
        record = self.record.get(of, {}) if of else self.record
        metric = record.get("metrics", {}).get(name)
        if metric is None or metric["interval"] is None:
            return None
        return Bounds(metric["value"], *metric["interval"])


def wilson_interval(p: float, n: float) -> Bounds:
    """Return Wilson's interval, at Z standard errors, of a share p of n pairs."""
    return Bounds(p, *wilson(p, max(n, 1), Z))


def loss_traits(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the recorded traits of a run's loss, see core/losses/base.py; None for supervised fine-tuning.

    Records that were written before traits were hold the loss's settings and kind, which had these.
    """
    loss = record["config"].get("loss")
    if loss is None or "loss_traits" in record:
        return record.get("loss_traits")
    kind, beta = loss["kind"], loss["beta"]
    at_zero = dict.fromkeys(("dpo", "cdpo", "rdpo"), math.log(2)) | {"hinge": 1.0}
    at_zero |= dict.fromkeys(("ipo", "ipo_mean"), 1 / (2 * beta) ** 2)
    return {"is_per_token": kind in ("ipo_mean", "simpo"), "loss_at_zero_margin": at_zero.get(kind)}


def lowest(rows: Sequence[Row], name: str) -> Row:
    """Return the row where a metric is lowest, the first of several."""
    return min(rows, key=lambda row: row[name])


def _of(row: Mapping[str, float], split: str) -> dict[str, float]:
    return {name.removeprefix(split): value for name, value in row.items() if name.startswith(split)}
