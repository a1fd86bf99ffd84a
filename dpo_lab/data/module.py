"""The loaders: which pairs make up which step, as a function of (seed, epoch, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.core.table import PairTable
from dpo_lab.data.collate import collate


class StepSampler(Sampler[list[int]]):
    """One rank's pairs of every optimizer step: `batch_size` pairs over all ranks, whatever their number.

    Epoch e is a permutation drawn from (seed, e), cut into steps of batch_size. Within a step pairs are sorted by size
    and dealt to the ranks so that all have about as many tokens; the draw itself knows nothing of sizes. Any step can be
    had without those before it. Pairs that don't fill a last step wait for the next epoch's permutation.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """sizes: tokens of each pair."""
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        return (self._share(order, step) for step in range(len(self)))

    def __len__(self) -> int:
        return len(self.sizes) // self.batch_size

    def step(self, epoch: int, step: int) -> list[int]:
        """This rank's pairs of one step."""
        return self._share(self._order(epoch), step)

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
        rank, world_size = self._rank_and_world_size()
        sampler = StepSampler(self.train.sizes.tolist(), self.batch_size, self.seed, rank, world_size)
        return DataLoader(
            self.train,  # type: ignore[arg-type]  # a sequence is a dataset
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        mine = range(rank, len(self.held_out), world_size)
        most = -(-len(self.held_out) // world_size)  # that a rank has: all have as many batches, be the last one empty
        batches = [mine[start : start + 64] for start in range(0, most, 64)]
        return DataLoader(self.held_out, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
