"""Fits of a second, each with one thing wrong that its name says, for tests of run health: real training, a real record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from dpo_lab.core.losses import DPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.models.reference import Cached, Uniform
from dpo_lab.models.tokenizer import train_tokenizer
from dpo_lab.runs import run_record
from dpo_lab.runs.renamed_keys import present_config
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.callbacks.checkpointing import Checkpointing
from dpo_lab.training.callbacks.health import Health
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO, newest
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.loggers.jsonl import JSONLLogger
from dpo_lab.training.optim import Optim
from dpo_lab.training.step_zero import check_step_zero, first_batch

BATCH, LOGGED = 16, 4  # pairs a step, steps a row
GOOD, BAD = 5, 6  # tokens that tell a side, where pairs can be told


def pairs(count: int, told: float, seed: int = 0, flipped: float = 0.0) -> list[EncodedPair]:
    """Random tokens. told: the share of pairs whose chosen side opens with GOOD and rejected with BAD, the others are the
    other way round; flipped: the share that label noise swapped after that.
    """
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt, chosen, rejected = (torch.randint(10, 250, (n,), generator=random).tolist() for n in (3, 6, 6))
        first, second = (GOOD, BAD) if i < told * count else (BAD, GOOD)
        pair = EncodedPair(f"{seed}-{i}", prompt, [first, *chosen], [second, *rejected])
        made.append(pair.flip() if i % 10 < 10 * flipped else pair)
    return made


def untold(count: int, seed: int = 0, flipped: float = 0.0) -> list[EncodedPair]:
    """Random tokens, and labels that nothing tells: they can only be learned by heart."""
    made = pairs(count, 0.5, seed, flipped)
    return [replace(p, chosen=p.chosen[1:], rejected=p.rejected[1:]) for p in made]


@cache
def initial_policy() -> Policy:
    tokenizer = train_tokenizer(["the plot was good and its music too"], 300)
    model = TinyPolicy(hidden_size=32, layers=1, heads=4, intermediate_size=32).build(tokenizer, seed=0)
    select_forward(model)
    return Policy(model, tokenizer)


def train(
    folder: Path,
    train_pairs: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    *,
    steps: int = 48,
    lr: float = 3e-3,
    reference: Cached | Uniform | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Callable[[int], list[Logger]] = lambda step: [],
    every: int = 1000,
) -> Trainer:
    """Fit in `folder`, or resume the fit there; the record is as `pipelines.train_dpo` leaves it. every: steps a checkpoint."""
    table, aside = PairTable.of(train_pairs), PairTable.of(held_out)
    model, loss, reference = trainable_copy(initial_policy().model), DPO(0.5), reference or Cached()
    logps = reference.prepare(model, table.concat(aside), folder)
    optim = Optim(lr=lr, warmup_steps=4)
    settings = {
        "loss": {"kind": "dpo", "beta": 0.5},
        "optim": {"lr": lr, "warmup_steps": 4},
        "data": {"batch_size": BATCH},
        "trainer": {"max_steps": steps},
        "if_exists": "error",
    }
    config = present_config(settings)  # with the keys that were added
    data = {
        "train pairs": len(table),
        "held-out pairs": len(aside),
        "flipped by label noise": sum(p.flipped for p in train_pairs),
    }
    first = collate(table[:BATCH])
    with run_record.acquire_run(folder, config, []) as held:
        assert held is not None
        held.update(data=data)
        if reference.starts_at_policy:
            held.update(step_zero_loss=check_step_zero(model, loss, logps, first))
        else:
            held.update(first_batch=first_batch(model, loss, logps, first))
        checkpoint = newest(folder / CHECKPOINTS)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=steps // 4,
            log_every_n_steps=LOGGED,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            plugins=[VerifiedCheckpointIO()],
            callbacks=[Health(), *callbacks, Checkpointing(every_n_steps=every)],
            logger=[
                JSONLLogger(folder),
                *loggers(0 if checkpoint is None else int(checkpoint.stem.removeprefix("step="))),
            ],
        )
        seed_everything(1, verbose=False)
        module = DPOModule(
            model, loss, logps, optim, total_steps=steps, batch_size=BATCH, tokens_per_microbatch=100_000
        )
        loaders = PreferenceDataModule(table, aside, batch_size=BATCH, num_workers=0, seed=0)
        trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
    return trainer


def health_of(trainer: Trainer) -> Health:
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, Health))  # type: ignore[attr-defined]
    return found


TOLD, HELD_OUT = pairs(640, 0.8), pairs(100, 0.8, 1)
FITS: dict[str, dict[str, Any]] = {
    "nothing held out": dict(train_pairs=pairs(64, 0.8), held_out=[], steps=8),
    "uniform reference": dict(
        train_pairs=[replace(pair, rejected=pair.rejected[:4]) for pair in TOLD],
        held_out=HELD_OUT,
        reference=Uniform(),
        steps=8,
    ),
    "no learning rate": dict(train_pairs=TOLD, held_out=HELD_OUT, lr=0.0, steps=24),
    "far too high a rate": dict(train_pairs=TOLD, held_out=HELD_OUT, lr=1.0, steps=24),
    "told by a token": dict(train_pairs=pairs(1280, 1.0), held_out=pairs(100, 1.0, 1), lr=3e-2, steps=80),
    "by heart": dict(train_pairs=untold(96, flipped=0.3), held_out=untold(200, 1), lr=1e-2, steps=80),
    "healthy": dict(train_pairs=TOLD, held_out=HELD_OUT, lr=3e-3, steps=40),
}
