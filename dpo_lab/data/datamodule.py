"""The data module and its sampler: which pairs make up which step, as a function of (seed, step) alone."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate
from dpo_lab.distributed.launcher import set_parent_death_signal


class StepSampler(Sampler[list[int]]):
    """One rank's pairs of every optimizer step: `batch_size` pairs over all ranks, whatever their number; without an
    end.

    Epoch e is a permutation drawn from (seed, e), cut into `steps_per_epoch` steps of batch_size. Within a step pairs
    are sorted by size and dealt to the ranks so that all have about as many tokens; the draw itself knows nothing of
    sizes. Any step can be had without those before it. Pairs that don't fill a last step wait for the next epoch's
    permutation.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        """sizes: tokens of each pair; start: the step, 0 for a run's first, that iteration begins with."""
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
        """This rank's pairs of one step."""
        epoch, of_epoch = divmod(step, self.steps_per_epoch)
        return self._share(self._order(epoch), of_epoch)

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order/{epoch}"))
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def _share(self, order: list[int], step: int) -> list[int]:
        of_step = order[step * self.batch_size : (step + 1) * self.batch_size]
        longest_first = sorted(of_step, key=lambda pair: -self.sizes[pair])
        return [pair for i, pair in enumerate(longest_first) if self._dealt_to(i) == self.rank]

    def _dealt_to(self, place: int) -> int:
        """Ranks 0 to W - 1, then W - 1 to 0, and so on: each has as many long pairs as short ones."""
        lap, seat = divmod(place, self.world_size)
        return seat if lap % 2 == 0 else self.world_size - 1 - seat


class PreferenceDataModule(LightningDataModule):
    """Train and held-out loaders over encoded pairs; each held-out pair is read by exactly one rank."""

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
        """From the next step on: of a run that goes on from a checkpoint the trainer knows it already."""
        rank, world_size = self._rank_and_world_size()
        start = self.trainer.global_step if self.trainer else 0
        sampler = StepSampler(self.train.sizes.tolist(), self.batch_size, self.seed, rank, world_size, start)
        return self._loader(self.train, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        mine = range(rank, len(self.held_out), world_size)
        of_fullest_rank = range(0, len(self.held_out), world_size)
        # a rank without pairs still takes part, in each batch, when the others add theirs up
        batches = [mine[start : start + 64] for start in range(0, len(of_fullest_rank), 64)]
        return self._loader(self.held_out, batches, 0)

    def on_exception(self, exception: BaseException) -> None:
        """Let the workers go: a trainer that fails in a validation would leave them, and wait for them at exit."""
        if self.trainer:
            self.trainer.fit_loop.teardown()

    def _loader(self, pairs: PairTable, batches: Iterable[Sequence[int]], workers: int) -> DataLoader:
        return DataLoader(
            pairs,  # type: ignore[arg-type]  # a sequence is a dataset
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_live_with_the_rank,
            generator=torch.Generator().manual_seed(0),  # else every start draws from the run's own
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _live_with_the_rank(worker: int) -> None:
    """A worker dies with its rank, however that dies, and not before: a rank that is asked to stop has a step to
    finish.
    """
    set_parent_death_signal(signal.SIGKILL)
    for signum in (signal.SIGTERM, signal.SIGINT):  # what a terminal or a scheduler sends to the whole group
        signal.signal(signum, signal.SIG_IGN)
