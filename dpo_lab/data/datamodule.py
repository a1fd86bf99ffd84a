"""The data module and its sampler: which pairs make up which step, as a function of (seed, step) alone."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate
from dpo_lab.distributed.launcher import set_parent_death_signal


class StepSampler(Sampler[list[int]]):
    """An endless sampler of one rank's pairs of every optimizer step, which has `batch_size` pairs over all ranks.

    Epoch e is a permutation drawn from (seed, e), split into `steps_per_epoch` steps of batch_size pairs; the remainder
    is left out in that epoch. Within a step pairs are sorted by size and divided over ranks so that all have about as
    many tokens; which pairs make up a step does not depend on sizes. Any step can be computed without the steps before
    it.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        """Create a sampler. sizes: tokens of each pair; start: the step (0-based) that iteration starts with."""
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        first, done = divmod(self.start, self.steps_per_epoch)
        for epoch in count(first):
            order = self._order(epoch)
            yield from (self._share(order, step) for step in range(done, self.steps_per_epoch))
            done = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sizes) // self.batch_size

    def step(self, step: int) -> list[int]:
        """Return this rank's pairs of one step."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return self._share(self._order(epoch), step_of_epoch)

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order/{epoch}"))
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def _share(self, order: list[int], step: int) -> list[int]:
        pairs = order[step * self.batch_size : (step + 1) * self.batch_size]
        longest_first = sorted(pairs, key=lambda pair: -self.sizes[pair])
        return [pair for i, pair in enumerate(longest_first) if self._rank_of(i) == self.rank]

    def _rank_of(self, index: int) -> int:
        """Assign ranks 0 to W - 1, then W - 1 to 0, and so on, so that each has as many long pairs as short ones."""
        turn, position = divmod(index, self.world_size)
        return position if turn % 2 == 0 else self.world_size - 1 - position


class PreferenceDataModule(LightningDataModule):
    """Loaders of training and held-out pairs; each held-out pair is read by exactly one rank. charts: see BaseModule; of what
    is counted of the data.
    """

    charts: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        train: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.held_out = (p if isinstance(p, PairTable) else PairTable.of(p) for p in (train, held_out))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self) -> DataLoader:
        """Return a loader that starts with the next step, which the trainer knows when a run is resumed."""
        rank, world_size = self._rank_and_world_size()
        start = self.trainer.global_step if self.trainer else 0
        sampler = StepSampler(self.train.sizes.tolist(), self.batch_size, self.seed, rank, world_size, start)
        return self._loader(self.train, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        own = range(rank, len(self.held_out), world_size)
        most = len(range(0, len(self.held_out), world_size))  # pairs of rank 0, which has the most
        # all ranks have the same number of batches, maybe empty ones: each batch has collectives
        batches = [own[start : start + 64] for start in range(0, most, 64)]
        return self._loader(self.held_out, batches, 0)

    def most_tokens(self, world_size: int) -> int:
        """Return the most tokens that a rank trains on in a step of `world_size` ranks."""
        return int(np.sort(self.train.sizes)[::-1][: -(-self.batch_size // world_size)].sum())

    def trial_batch(self, tokens: int) -> Any:
        """Return a micro-batch of up to `tokens` tokens, at least of the longest pair, which pads most."""
        chosen, at = [self.train[int(self.train.sizes.argmax())]], 0
        size = chosen[0].size
        while size + (pair := self.train[at % len(self.train)]).size <= tokens:
            chosen.append(pair)
            size += pair.size
            at += 1
        return collate(chosen)

    def counters(self) -> dict[str, float]:
        """Return values to log that were counted since the last call."""
        return {}

    def on_exception(self, exception: BaseException) -> None:
        """End the workers: a trainer that fails during validation does not, and would wait for them at exit."""
        if self.trainer:
            self.trainer.fit_loop.teardown()

    def _loader(self, pairs: PairTable, batches: Iterable[Sequence[int]], workers: int) -> DataLoader:
        return DataLoader(
            pairs,  # type: ignore[arg-type]  # a sequence is a dataset
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            generator=torch.Generator().manual_seed(0),  # else each loader draws from the global generator
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _init_worker(worker: int) -> None:
    """Make a worker end with its rank and not before: a rank that is asked to stop has to finish its step."""
    set_parent_death_signal(signal.SIGKILL)
    for signum in (signal.SIGTERM, signal.SIGINT):  # sent to the whole process group by terminals and schedulers
        signal.signal(signum, signal.SIG_IGN)
