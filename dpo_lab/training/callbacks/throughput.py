"""The throughput callback: tokens and pairs trained per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lab.core.pairs import PairBatch
from dpo_lab.distributed.collectives import all_gather_object


class Throughput(Callback):
    """Counts the pairs and tokens that this attempt trains on, and the time from its first to its last step without
    validation.

    A pair has the tokens of its prompt, counted once, and of both responses; supervised fine-tuning counts each
    response as a pair without a rejected response.
    """

    def __init__(self) -> None:
        self.pairs = self.tokens = 0  # of this rank
        self.seconds = 0.0
        self.since: float | None = None  # start of the time that is not in `seconds` yet
        self.is_training = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this rank so far; 0 before the first step."""
        seconds = self._elapsed()
        return self.tokens / seconds if self.tokens and seconds > 0 else 0.0

    def throughput(self) -> dict[str, float]:
        """Return pairs and tokens per second of all ranks, which all have to call it; {} if no step was trained."""
        ranks = all_gather_object((self.pairs, self.tokens, self._elapsed()))
        pairs, tokens, seconds = sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks), ranks[0][2]
        if not pairs or seconds <= 0:
            return {}
        return {"tokens_per_second": round(tokens / seconds, 1), "pairs_per_second": round(pairs / seconds, 2)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what runs inside."""
        self._pause()
        yield
        self._resume()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_training = True
        self._resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        self.pairs += len(batch)
        self.tokens += int(batch.lengths.sum())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_training:
            self._resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()
        self.is_training = False

    def _resume(self) -> None:
        self.since = time.perf_counter()

    def _pause(self) -> None:
        self.seconds, self.since = self._elapsed(), None

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)


def throughput_callback(trainer: Trainer) -> Throughput | None:
    """Return the trainer's Throughput callback, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
    return next((callback for callback in callbacks if isinstance(callback, Throughput)), None)


def throughput(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Return the entry of the run record, see Throughput.throughput; {} if this attempt trained no step."""
    callback = throughput_callback(trainer)
    measured = callback.throughput() if callback is not None else {}
    return {"throughput": measured} if measured else {}
