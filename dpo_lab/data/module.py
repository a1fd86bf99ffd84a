"""The loaders: which pairs make up which step, as a function of (seed, epoch, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank, so that every optimizer step sees `batch_size` pairs whatever the ranks and micro-batches.

    Epoch e is a permutation drawn from (seed, e), cut into steps of batch_size; a step is cut into micro-batches and they
    are dealt to the ranks in turn. Pairs that don't fill a last step wait for the next epoch's permutation.
    """

    def __init__(
        self, pairs: int, batch_size: int, microbatch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.pairs, self.batch_size, self.microbatch_size = pairs, batch_size, microbatch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order/{self.epoch}"))
        order = torch.randperm(self.pairs, generator=generator).tolist()
        for step in range(self.pairs // self.batch_size):
            of_step = order[step * self.batch_size : (step + 1) * self.batch_size]
            for start in range(self.rank * self.microbatch_size, len(of_step), self.world_size * self.microbatch_size):
                yield of_step[start : start + self.microbatch_size]

    def __len__(self) -> int:
        return self.pairs // self.batch_size * (self.batch_size // self.microbatch_size // self.world_size)


class PreferenceDataModule(LightningDataModule):
    """Train and held-out loaders over encoded pairs; each held-out pair is read by exactly one rank."""

    def __init__(
        self,
        train: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
        *,
        batch_size: int,
        microbatch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.held_out = train, held_out
        self.batch_size, self.microbatch_size, self.num_workers, self.seed = (
            batch_size,
            microbatch_size,
            num_workers,
            seed,
        )

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        sampler = StepSampler(
            len(self.train), self.batch_size, self.microbatch_size, self.seed, rank=rank, world_size=world_size
        )
        return DataLoader(
            self.train,  # type: ignore[arg-type]  # a list is a dataset
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        return DataLoader(self.held_out[rank::world_size], batch_size=64, collate_fn=collate)  # type: ignore[arg-type]

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
