"""A small fit, for tests that train: the same model, pairs and reference every time, by any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_lab.core.losses import DPO, Loss
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.models.reference import Cached
from dpo_lab.models.tokenizer import train_tokenizer
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from dpo_lab.training.step_level_module import module_for
from tests.conftest import make_pairs

PAIRS, BATCH, HELD_OUT = 30, 8, 7


def initial_policy(layers: int = 1) -> Policy:
    """Random weights, the same every time, on the shared-prompt path."""
    tokenizer = train_tokenizer(["the plot was good and its music too"], 300)
    model = TinyPolicy(hidden_size=32, layers=layers, heads=4, intermediate_size=32).build(tokenizer, seed=0)
    select_forward(model)
    return Policy(model, tokenizer)


def make_module(
    model: PreTrainedModel, folder: Path, steps: int, tokens: int = 2048, loss: Loss | None = None
) -> DPOModule:
    """DPO, or another loss, of a copy of `model`; tokens: of a micro-batch."""
    loss = loss or DPO(0.5)
    train, held_out = tables(loss)
    pairs = train.concat(held_out)
    reference = Cached().prepare(model, pairs if pairs.unrelated is None else pairs.concat(pairs.unrelated), folder)
    step = dict(total_steps=steps, batch_size=BATCH, tokens_per_microbatch=tokens)
    # at such a rate Adam's first steps would blow a rounding difference up; the rate of a real run does not
    return module_for(loss)(trainable_copy(model), loss, reference, Optim(lr=1e-3, warmup_steps=0), **step)


def tables(loss: Loss) -> tuple[PairTable, PairTable]:
    """Training and held-out pairs."""
    pairs, held_out = make_pairs(PAIRS, vocabulary=250), make_pairs(HELD_OUT, seed=9, vocabulary=250)
    scores = [1 + i % 3 / 4 for i in range(PAIRS)]
    return loss.prepare(PairTable.of(pairs, scores)), loss.prepare(PairTable.of(held_out, scores[:HELD_OUT]))


def make_data(num_workers: int = 0, seed: int = 0, loss: Loss | None = None) -> PreferenceDataModule:
    train, held_out = tables(loss or DPO(0.5))
    return PreferenceDataModule(train, held_out, batch_size=BATCH, num_workers=num_workers, seed=seed)


def make_trainer(steps: int, devices: int = 1, **settings: Any) -> Trainer:
    """Quiet, on the CPU; figures are logged in every step, and held-out pairs looked at after the last one."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    rhythm = dict(log_every_n_steps=1, num_sanity_val_steps=0, check_val_every_n_epoch=None, val_check_interval=steps)
    plan = dict(accelerator="cpu", devices=devices, max_steps=steps, max_epochs=-1, use_distributed_sampler=False)
    return Trainer(**(quiet | rhythm | plan | settings))


class Seen(Callback):
    """Every step's logged figures, and the gradient that the first step was made by."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.gradient is None:
            self.gradient = flat([p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.figures.append(
            {name: value.item() for name, value in trainer.callback_metrics.items() if "val" not in name}
        )


def fit(
    module: DPOModule, data: PreferenceDataModule, steps: int, devices: int = 1, resume: Path | None = None
) -> tuple[DPOModule, dict[str, Any], Trainer]:
    """Fit a module; gives it, what is to be the same however its steps are split (see assert_same_fit), and the trainer."""
    seen = Seen()
    trainer = make_trainer(steps, devices, callbacks=[seen], strategy="ddp" if devices > 1 else "auto")
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    found = {"gradient": seen.gradient, "weights": flat(module.model.parameters()), "figures": seen.figures}
    return module, found | {"val/loss": trainer.callback_metrics["val/loss"].item()}, trainer


def assert_same_fit(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of two fits of the same pairs: the first gradient, the weights, every step's figures and the held-out loss."""
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=2e-5)
    for one, other in zip(found["figures"], expected["figures"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)


def flat(tensors: Any) -> Tensor:
    """All numbers of tensors in one row, of those that are cut over ranks the whole."""
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in whole])
