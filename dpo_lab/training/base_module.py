"""The base LightningModule: one optimizer step per batch, in micro-batches, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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
from dpo_lab.models.forward import disable_dropout, dummy_nll
from dpo_lab.models.sharded_weights import full_tensor, set_digest
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.nonfinite import nonfinite_pairs, not_finite
from dpo_lab.training.optim import Optim


class BaseModule(LightningModule):
    """A LightningModule with manual optimization; subclasses define the loss, its normalizer and the metrics.

    A batch is the part of one optimizer step that this rank computes. It is split into micro-batches of
    `tokens_per_microbatch`, so memory does not grow with it. title: the name of the training on the terminal; charts:
    the scalars that TensorBoard shows on one chart, by group and title of the chart.

    Once per step a small all-reduce shares two facts among ranks: whether a number is not finite, which ends the run
    before the optimizer applies it, and whether a rank was asked to stop (`request`). `stopping` is then that signal on
    all ranks at the same step, otherwise 0. Ranks stop after that step, when callbacks have run their hooks for its
    end.
    """

    title: ClassVar[str]
    charts: ClassVar[dict[str, tuple[str, ...]]] = {"loss/training and held out": ("train/loss", "val/loss")}
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
        self.automatic_optimization = False  # a step has several backward passes; only the last synchronises gradients
        self.model, self.optim, self.total_steps = model, optim, total_steps
        self.tokens_per_microbatch = tokens_per_microbatch
        self.train_metrics, self.val_metrics = metrics(), metrics()

    def normalizer(self, batch: PairBatch) -> int:
        """Return the number that the summed loss of this batch's step is divided by, counted over all ranks."""
        raise NotImplementedError

    def part_loss(self, part: PairBatch) -> Tensor:
        """Return the sum of a micro-batch's losses, differentiable, and update train_metrics."""
        raise NotImplementedError

    def validate_part(self, part: PairBatch) -> None:
        """Update val_metrics with a micro-batch."""
        raise NotImplementedError

    def counters(self) -> dict[str, float]:
        """Return values to log besides the means."""
        return {}

    def dummy_loss(self) -> Tensor:
        """Return a differentiable loss of 0, from a response of one token."""
        return 0 * dummy_nll(self.model)

    def dummy_passes(self, parts: int) -> range:
        """Return the dummy passes that a rank with `parts` micro-batches has to run, so that all ranks run equally
        many.

        Where the model is sharded, every rank takes part in each pass of the others; otherwise there are no dummy
        passes.
        """
        return range(all_reduce_max(parts, self.device) - parts if self._is_sharded else 0)

    def configure_model(self) -> None:
        """Shard the model, unless it is sharded already; its weights are about to change."""
        if self._is_sharded:
            self.trainer.strategy.sharding.shard(self.model)  # type: ignore[attr-defined]
            set_digest(self.model, None)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        optimizer: LightningOptimizer = self.optimizers()  # type: ignore[assignment]
        share = self.trainer.world_size / self.normalizer(batch)  # gradient synchronisation averages over ranks
        parts, losses = batch.split(self.tokens_per_microbatch), []
        for _ in self.dummy_passes(len(parts)):
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self.dummy_loss())
        for part in parts:
            with optimizer.toggle_model(sync_grad=part is parts[-1]):
                loss = self.part_loss(part)
                self.manual_backward(loss * share)
            losses.append(loss.detach())
        if self._scaler is not None:
            self._scaler.unscale_(optimizer.optimizer)  # before gradients are clipped and checked
        total, norm = torch.stack(losses).sum(), full_tensor(self.optim.clip(self.model.parameters()))
        if self._scaler is None:
            total = total + norm
        if self._any_rank(~torch.isfinite(total)):
            self._raise_not_finite(parts, losses)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self.log_means(self.train_metrics, "train/", self.counters())

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        parts = batch.split(self.tokens_per_microbatch)
        for _ in self.dummy_passes(len(parts)):
            self.dummy_loss()
        for part in parts:
            self.validate_part(part)
        self._agree_to_stop()

    def on_validation_epoch_end(self) -> None:
        self.log_means(self.val_metrics, "val/", {})

    def on_train_start(self) -> None:
        disable_dropout(self.model)  # else DPO's loss at step 0 is not ln 2, and a loss depends on the micro-batches
        self._install_signal_handlers()

    def on_validation_start(self) -> None:
        self._install_signal_handlers()

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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of the module without its frozen weights, which a checkpoint does not need."""
        state = super().state_dict(*args, **kwargs)
        for name in self._frozen & state.keys():
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of the module and leave its frozen weights as they are, also if `state_dict` holds them."""
        frozen = {name: tensor for name, tensor in super().state_dict().items() if name in self._frozen}
        return super().load_state_dict({**state_dict, **frozen}, strict, assign)

    def log_means(self, metrics: Metric, split: str, counters: Mapping[str, float]) -> None:
        """Log the means since the last call, summed over ranks by `compute`, at the number of optimizer steps done.

        Calls the loggers directly: `self.log` takes 0.3 ms per value in every step and counts steps differently.
        """
        values = {split + name: value for name, value in (metrics.compute() | counters).items()}
        metrics.reset()
        if self.trainer.sanity_checking:
            return
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.global_step)

    def _install_signal_handlers(self) -> None:
        """Replace Lightning's signal handlers, which would run a collective at any point of the program."""
        if self.request is not None:
            self.request.listen()

    def _agree_to_stop(self) -> None:
        """Set `stopping` to the signal that asked any rank to stop; a collective that all ranks have to call."""
        if self.request is not None:
            self._any_rank(torch.zeros((), dtype=torch.bool, device=self.device))

    def _stop_if_asked(self) -> None:
        if self.stopping and self.request is not None:
            self.request.raise_or_requeue(self.stopping)

    def _any_rank(self, flag: Tensor) -> bool:
        """Return whether the flag is set on any rank; set `stopping` in the same collective."""
        signum = (self.request and self.request.signum) or 0
        if self.trainer.world_size == 1:
            self.stopping = signum
            return bool(flag)
        message = torch.stack((flag.long(), torch.tensor(signum, device=flag.device)))
        reduced: Tensor = self.trainer.strategy.reduce(message, reduce_op="max")  # type: ignore[assignment]
        is_set, self.stopping = reduced.tolist()
        return bool(is_set)

    def _raise_not_finite(self, parts: Sequence[PairBatch], losses: Sequence[Tensor]) -> None:
        """Raise NotFinite on every rank, naming the pairs of all ranks whose loss or gradient is not finite."""
        parameters = [] if self._is_sharded else [p for p in self.model.parameters() if p.requires_grad]
        pairs = all_gather_object(nonfinite_pairs(parts, losses, self.part_loss, parameters))
        raise not_finite(self.global_step + 1, pairs, Path(self.trainer.default_root_dir) / CHECKPOINTS)

    @property
    def _frozen(self) -> set[str]:
        """The names of the weights that are not trained: under adapters, those of the base."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}

    @property
    def _is_sharded(self) -> bool:
        """Whether the model is sharded over ranks, so that all ranks have to run each forward pass together."""
        return getattr(self.trainer.strategy, "shards_model", False)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of float16, which skips steps of infinite gradients until it has found a scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
