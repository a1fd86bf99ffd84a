"""A fit of milliseconds that draws from every random generator, and what is left of it, to be compared bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from dpo_lab.core.losses import DPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import TinyPolicy, weights_digest
from dpo_lab.models.reference import Reference, Uniform
from dpo_lab.models.reward_head import with_reward_head
from dpo_lab.models.sharded_weights import from_rank_zero
from dpo_lab.models.sharding import Facts
from dpo_lab.models.tokenizer import train_tokenizer
from dpo_lab.pipelines.session import fit
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.checkpointing import Checkpointing
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO, by_step, newest, remove_leftovers
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.loggers.jsonl import JSONLLogger
from dpo_lab.training.optim import Optim
from dpo_lab.training.reward_module import RewardModule
from dpo_lab.training.sft_module import SFTModule
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from tests.conftest import make_pairs

TOKENIZER = train_tokenizer(["the plot was good and its music too"], 300)
PAIRS = PairTable.of(make_pairs(14, vocabulary=250))
HELD_OUT = PairTable.of(  # two batches; in few micro-batches, since they are short
    replace(p, prompt=p.prompt[:1], chosen=p.chosen[:2], rejected=p.rejected[:1])
    for p in make_pairs(70, seed=9, vocabulary=250)
)
STEPS = 7  # of 4 pairs, 3 of them an epoch; validated every 3, logged every 2, saved every 2
IGNORED = (
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",
    "ignore::FutureWarning:lightning",
)


class Noisy(DPOModule):
    """Draws from every generator in every micro-batch, and keeps a dropout on: a state that was not saved shows at once."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.dropout = torch.nn.Dropout(0.5).train()

    def part_loss(self, part):
        drawn = torch.rand(()).item() + random.random() + np.random.rand()
        return super().part_loss(part) * (1 + drawn * self.dropout(torch.ones(4)).mean())


class Leave(Exception):
    """A crash."""


class LeaveAt(Callback):
    """Crash before step N + 1, or in the validation after step N."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step and not self.validating:
            raise Leave

    def on_validation_batch_start(self, trainer, module, batch, index, *args) -> None:
        if trainer.global_step == self.step and self.validating and index == 1:
            raise Leave


def trainer_of(folder: Path, *, steps: int = STEPS, devices: int = 1, callbacks: Sequence[Callback] = (), **settings):
    every = settings.pop("every_n_steps", 2)
    keepers = [Checkpointing(every_n_steps=every)] if every else []
    return Trainer(
        accelerator=settings.pop("accelerator", "cpu"),
        devices=devices,
        strategy=settings.pop("strategy", "ddp" if devices > 1 else "auto"),
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        enable_progress_bar=settings.pop("enable_progress_bar", False),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        plugins=[VerifiedCheckpointIO()],
        callbacks=[*callbacks, *keepers],
        enable_checkpointing=bool(keepers),
        **(dict(val_check_interval=3, log_every_n_steps=2, logger=[JSONLLogger(folder)]) | settings),
    )


def run(
    folder: Path,
    *,
    kind: type[BaseModule] = Noisy,
    workers: int = 0,
    optim: Optim | None = None,
    loggers: Callable[[int], list[Logger]] | None = None,
    adapters: torch.dtype | None = None,
    reference: Reference | None = None,
    prepare: Callable[..., tuple[BaseModule, PreferenceDataModule]] | None = None,
    **settings,
) -> Trainer:
    """Start a fit in `folder`, or go on with the one there, as every start of a run does.

    adapters: train low-rank adapters alone, and keep all weights in this dtype. prepare: makes another module and its data
    from model, optim and the settings of a step.
    loggers: those beside the journal, of a run that goes on from a step (0: from none).
    """
    remove_leftovers(folder / CHECKPOINTS)
    checkpoint = newest(folder / CHECKPOINTS)
    if loggers is not None:
        settings["logger"] = [*loggers(step_of(checkpoint)), JSONLLogger(folder)]
    trainer = trainer_of(folder, **settings)
    seed_everything(3, verbose=False)
    model = TinyPolicy(hidden_size=8, layers=1, heads=2, intermediate_size=8).build(TOKENIZER, seed=0)
    if adapters is not None:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).to(adapters)
    select_forward(model)
    if isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.setup_environment()
        whole = model if trainer.is_global_zero else None
        facts = whole and Facts(weights_digest(whole), False)
        model = trainable_copy(from_rank_zero(trainer.strategy.sharding, whole, facts))
    optim = optim or Optim(lr=1e-2, warmup_steps=2)
    step = dict(total_steps=trainer.max_steps, tokens_per_microbatch=40)
    train, held_out = PAIRS, HELD_OUT
    data = None
    if prepare is not None:
        module, data = prepare(model, optim, **step)
    elif issubclass(kind, SFTModule):
        module, train, held_out = kind(model, optim, **step), train.chosen_only(), held_out.chosen_only()
    elif issubclass(kind, RewardModule):
        module = kind(with_reward_head(model), optim, 0.1, batch_size=4, **step)
    else:
        logps = (reference or Uniform()).prepare(model, [*PAIRS, *HELD_OUT], folder)
        module = kind(model, DPO(0.5), logps, optim, batch_size=4, **step)
    data = data or PreferenceDataModule(train, held_out, batch_size=4, num_workers=workers, seed=5)
    fit(trainer, module, data, checkpoint)
    return trainer


def cut(folder: Path, step: int, **settings) -> None:
    """A fit that crashes before step + 1."""
    with pytest.raises(Leave):
        run(folder, callbacks=[LeaveAt(step)], **settings)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step="))


def left(folder: Path) -> dict[str, Any]:
    """All that a fit leaves: the newest checkpoint's contents and the journal's bytes."""
    path = newest(folder / CHECKPOINTS)
    assert path is not None
    found = torch.load(path, weights_only=True) | {"journal": (folder / "metrics.jsonl").read_bytes()}
    del found["loops"]["fit_loop"][
        "epoch_loop.val_loop.batch_progress"
    ]  # how often it validated: nothing depends on it
    return found


def saved(folder: Path) -> list[int]:
    return list(by_step(folder / CHECKPOINTS))


def difference(one: Any, other: Any, at: str = "") -> str | None:
    """Where two nestings of plain values and tensors differ in a bit; None where they don't."""
    if type(one) is not type(other):
        return f"{at}: {type(one)}, {type(other)}"
    if isinstance(one, torch.Tensor):
        return None if one.dtype == other.dtype and torch.equal(one, other) else f"{at}: {one} {other}"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{at}: {list(one)} {list(other)}"
        return next((d for k in one if (d := difference(one[k], other[k], f"{at}/{k}"))), None)
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{at}: {len(one)}, {len(other)}"
        return next(
            (d for i, (a, b) in enumerate(zip(one, other, strict=True)) if (d := difference(a, b, f"{at}/{i}"))), None
        )
    return None if one == other else f"{at}: {one} {other}"
