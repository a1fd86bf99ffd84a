"""The base LightningModule: one optimizer step per batch, in micro-batches, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from dpo_lab.core.pairs import PairBatch
from dpo_lab.distributed.collectives import all_gather_object, all_reduce_max
from dpo_lab.distributed.signals import StopRequest
from dpo_lab.models.forward import disable_dropout, response_nll
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.nonfinite import nonfinite_pairs, not_finite
from dpo_lab.training.optim import Optim
from dpo_lab.training.strategies.fsdp import full_tensor, shard


class BaseModule(LightningModule):
    """Trains `model` by a mean over what a step holds: a kind says what is counted, what is lost, and what is measured.

    A batch is a rank's part of one optimizer step; it goes through the model in micro-batches of `tokens_per_microbatch`,
    so memory does not grow with it. title: what the work is called on the terminal; charts: scalars that TensorBoard puts on
    one chart, by the chart's group and title.

    Once a step ranks tell each other in one small message whether a number is not finite, which ends the run before the
    optimizer takes it over, and whether one of them was asked to stop (`request`): `stopping` is that signal in all of them
    at the same step, 0 without one. They stop after that step, once callbacks have done what they do at its end.
    """

    title: ClassVar[str]
    charts: ClassVar[dict[str, tuple[str, ...]]] = {"loss/training and held out": ("train/loss", "val/loss")}
    FORWARDS = ("part_loss", "validate_part", "idle")  # what computes with the model's weights
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

    def idle(self) -> Tensor:
        """A loss of 0 from a response of one token, to go backward from."""
        tokens = torch.zeros(2, dtype=torch.long, device=self.device)
        return 0 * response_nll(self.model, tokens, torch.ones_like(tokens)[None])

    def idle_passes(self, parts: int) -> range:
        """Passes that a rank of `parts` micro-batches idles through: where the model is cut over the ranks all of them
        have to take part in each one's passes.
        """
        return range(all_reduce_max(parts) - parts if self._is_cut else 0)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        optimizer: LightningOptimizer = self.optimizers()  # type: ignore[assignment]
        share = self.trainer.world_size / self.size(batch)  # sync takes the mean over ranks
        parts, losses = batch.split(self.tokens_per_microbatch), []
        for _ in self.idle_passes(len(parts)):
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self.idle())
        for part in parts:
            with optimizer.toggle_model(sync_grad=part is parts[-1]):
                loss = self.part_loss(part)
                self.manual_backward(loss * share)
            losses.append(loss.detach())
        if self._scaler is not None:
            self._scaler.unscale_(optimizer.optimizer)  # before the gradients are clipped, or looked at
        total, norm = torch.stack(losses).sum(), full_tensor(self.optim.clip(self.model.parameters()))
        if self._scaler is None:
            total = total + norm
        if self._is_so_in_any_rank(~torch.isfinite(total)):
            self._end(parts, losses)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self.log_means(self.train_metrics, "train/", self.counters())

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        parts = batch.split(self.tokens_per_microbatch)
        for _ in self.idle_passes(len(parts)):
            self.idle()
        for part in parts:
            self.validate_part(part)
        self._agree_to_stop()

    def on_validation_epoch_end(self) -> None:
        self.log_means(self.val_metrics, "val/", {})

    def on_train_start(self) -> None:
        disable_dropout(self.model)  # else DPO's step 0 is not ln 2, and a loss depends on how its step is cut up
        self._listen()

    def on_validation_start(self) -> None:
        self._listen()

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: PairBatch, batch_idx: int) -> None:
        self._stop_if_asked()

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: PairBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_if_asked()

    def on_train_end(self) -> None:
        self._agree_to_stop()
        self._stop_if_asked()

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

    def _listen(self) -> None:
        """Take signals back from Lightning, whose handler would talk to other ranks in the middle of anything."""
        if self.request is not None:
            self.request.listen()

    def _agree_to_stop(self) -> None:
        """Learn in `stopping` whether any rank was asked to stop; all ranks have to call it together."""
        if self.request is not None:
            self._is_so_in_any_rank(torch.zeros((), dtype=torch.bool, device=self.device))

    def _stop_if_asked(self) -> None:
        if self.stopping and self.request is not None:
            self.request.obey(self.stopping)

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
        parameters = [] if self._is_cut else [p for p in self.model.parameters() if p.requires_grad]
        found = all_gather_object(nonfinite_pairs(parts, losses, self.part_loss, parameters))
        raise not_finite(self.global_step + 1, found, Path(self.trainer.default_root_dir) / CHECKPOINTS)

    @property
    def _is_cut(self) -> bool:
        """Whether no rank has the whole model, so that all have to go through it together."""
        return getattr(self.trainer.strategy, "passes_together", False)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in float16, and skips steps whose gradients are infinite until the scale is found."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
