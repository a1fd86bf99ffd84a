"""What every LightningModule here shares: an optimizer step a batch, in micro-batches, the same for any number of ranks."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from dpo_lab.core.pairs import PairBatch
from dpo_lab.core.ranks import most
from dpo_lab.models.forward import response_nll, without_dropout
from dpo_lab.training.optim import Optim
from dpo_lab.training.sharding import shard


class StepModule(LightningModule):
    """Trains `model` by a mean over what a step holds: a kind says what is counted, what is lost, and what is measured.

    A batch is a rank's part of one optimizer step; it goes through the model in micro-batches of `tokens_per_microbatch`,
    so memory does not grow with it. title: what the work is called on the terminal.
    """

    title: ClassVar[str]
    FORWARDS = ("part_loss", "validate_part", "idle")  # what computes with the model's weights

    def __init__(
        self,
        model: PreTrainedModel,
        optim: Optim,
        metrics: type[Metric],
        *,
        total_steps: int,
        tokens_per_microbatch: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several backwards, and only the last one syncs ranks
        self.model, self.optim, self.total_steps = model, optim, total_steps
        self.tokens_per_microbatch = tokens_per_microbatch
        self.train_metrics, self.val_metrics = metrics(), metrics()

    def size(self, batch: PairBatch) -> int:
        """Over how many the loss of this batch's step is a mean, those of all ranks counted."""
        raise NotImplementedError

    def part_loss(self, part: PairBatch) -> Tensor:
        """The sum of a micro-batch's losses, to go backward from; seen by train_metrics."""
        raise NotImplementedError

    def validate_part(self, part: PairBatch) -> None:
        """Let val_metrics see a micro-batch."""
        raise NotImplementedError

    def idle(self) -> Tensor:
        """A loss of 0 from a response of one token, to go backward from."""
        tokens = torch.zeros(2, dtype=torch.long, device=self.device)
        return 0 * response_nll(self.model, tokens, torch.ones_like(tokens)[None])

    def idle_passes(self, parts: int) -> range:
        """Passes that a rank of `parts` micro-batches idles through: where the model is cut over the ranks all of them
        have to take part in each one's passes.
        """
        together = getattr(self.trainer.strategy, "passes_together", False)
        return range(most(parts, self.device) - parts if together else 0)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        optimizer: LightningOptimizer = self.optimizers()  # type: ignore[assignment]
        share = self.trainer.world_size / self.size(batch)  # sync takes the mean over ranks
        parts = batch.split(self.tokens_per_microbatch)
        for _ in self.idle_passes(len(parts)):
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self.idle())
        for part in parts:
            with optimizer.toggle_model(sync_grad=part is parts[-1]):
                self.manual_backward(self.part_loss(part) * share)
        self.optim.clip(self.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self.log_means(self.train_metrics, "train/")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        parts = batch.split(self.tokens_per_microbatch)
        for _ in self.idle_passes(len(parts)):
            self.idle()
        for part in parts:
            self.validate_part(part)

    def on_validation_epoch_end(self) -> None:
        self.log_means(self.val_metrics, "val/")

    def on_train_epoch_start(self) -> None:
        without_dropout(self.model)  # else DPO's step 0 is not ln 2, and a loss depends on how its step is cut up

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.model.parameters(), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log_means(self, metrics: Metric, split: str) -> None:
        """Log what was seen since the last call; `compute` has summed over ranks already."""
        for name, value in metrics.compute().items():
            self.log(split + name, value)
        metrics.reset()
