"""What every LightningModule here shares: an optimizer step a batch, in micro-batches, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.forward import without_dropout
from dpo_lab.stop import StopRequest
from dpo_lab.training.checkpoint import FOLDER
from dpo_lab.training.finite import culprits, not_finite
from dpo_lab.training.optim import Optim
from dpo_lab.training.ranks import of_all_ranks


class StepModule(LightningModule):
    """Trains `model` by a mean over what a step holds: a kind says what is counted, what is lost, and what is measured.

    A batch is a rank's part of one optimizer step; it goes through the model in micro-batches of `tokens_per_microbatch`,
    so memory does not grow with it. title: what the work is called on the terminal.

    Once a step ranks tell each other in one small message whether a number is not finite, which ends the run before the
    optimizer takes it over, and whether one of them was asked to stop (`request`): `stopping` is that signal on all of them
    at the same step, 0 without one. What is done about it is not decided here.
    """

    title: ClassVar[str]
    request: StopRequest | None = None
    stopping: int = 0

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

    def counters(self) -> dict[str, float]:
        """What is logged beside the means."""
        return {}

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        optimizer: LightningOptimizer = self.optimizers()  # type: ignore[assignment]
        share = self.trainer.world_size / self.size(batch)  # sync takes the mean over ranks
        parts, losses = batch.split(self.tokens_per_microbatch), []
        for part in parts:
            with optimizer.toggle_model(sync_grad=part is parts[-1]):
                loss = self.part_loss(part)
                self.manual_backward(loss * share)
            losses.append(loss.detach())
        total, norm = torch.stack(losses).sum(), self.optim.clip(self.model.parameters())
        if not self._scales_loss:
            total = total + norm
        if self._is_so_in_any_rank(~torch.isfinite(total)):
            self._end(parts, losses)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self.log_means(self.train_metrics, "train/", self.counters())

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        for part in batch.split(self.tokens_per_microbatch):
            self.validate_part(part)
        self.agreed_stop()

    def on_validation_epoch_end(self) -> None:
        self.log_means(self.val_metrics, "val/", {})

    def on_train_start(self) -> None:
        without_dropout(self.model)  # else DPO's step 0 is not ln 2, and a loss depends on how its step is cut up

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.model.parameters(), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log_means(self, metrics: Metric, split: str, counters: Mapping[str, float]) -> None:
        """Log what was seen since the last call at the optimizer steps done; `compute` has summed over ranks already.

        Straight to the loggers: `self.log` costs 0.3 ms a figure in every step, and counts steps in its own way.
        """
        figures = {split + name: value for name, value in (metrics.compute() | counters).items()}
        metrics.reset()
        if self.trainer.sanity_checking:
            return
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step=self.global_step)

    def agreed_stop(self) -> int:
        """The signal by which any rank was asked to stop, 0 without one; all ranks have to ask together."""
        if self.request is not None:
            self._is_so_in_any_rank(torch.zeros((), dtype=torch.bool, device=self.device))
        return self.stopping

    def _is_so_in_any_rank(self, so: Tensor) -> bool:
        asked = (self.request and self.request.signum) or 0
        if self.trainer.world_size == 1:
            self.stopping = asked
            return bool(so)
        told = torch.stack((so.long(), torch.tensor(asked, device=so.device)))
        is_so, self.stopping = self.trainer.strategy.reduce(told, reduce_op="max").tolist()  # type: ignore[union-attr]
        return bool(is_so)

    def _end(self, parts: Sequence[PairBatch], losses: Sequence[Tensor]) -> None:
        """Raise NotFinite in every rank, with the culprits of all."""
        sharded = isinstance(self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy))
        parameters = [] if sharded else [p for p in self.model.parameters() if p.requires_grad]
        found = of_all_ranks(culprits(parts, losses, self.part_loss, parameters))
        raise not_finite(self.global_step + 1, found, Path(self.trainer.default_root_dir) / FOLDER)

    @property
    def _scales_loss(self) -> bool:
        """Whether gradients may be infinite for a step or two until the loss's scale is found, which then skips them."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None
