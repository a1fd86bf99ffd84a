"""The base LightningModule: one optimizer step per batch, in micro-batches, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, distributed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from transformers import PreTrainedModel

from dpo_lab.core.pairs import PairBatch
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.distributed.collectives import all_gather_object, all_reduce_max
from dpo_lab.distributed.signals import StopRequest
from dpo_lab.models.autocast_linear import LinearCasts
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
    casts: LinearCasts | None = None

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

    def prepare_step(self, parts: Sequence[PairBatch]) -> None:
        """Compute what the losses of a step's micro-batches, the `parts` of this rank, share; called before them."""

    def finish_step(self) -> None:
        """Do what follows the optimizer's step."""

    def part_loss(self, part: PairBatch) -> Tensor:
        """Return the sum of a micro-batch's losses, differentiable, and update train_metrics."""
        raise NotImplementedError

    def validate_part(self, part: PairBatch) -> None:
        """Update val_metrics with a micro-batch."""
        raise NotImplementedError

    def trained_models(self) -> list[PreTrainedModel]:
        """Return the models that are trained."""
        return [self.model]

    def models(self) -> list[PreTrainedModel]:
        """Return the models that a step runs: the one in training, and a reference if there is one."""
        return [self.model]

    def clip_gradients_to_norm(self) -> Tensor:
        """Clip the gradients and return their norm before, which is not finite if a gradient is not."""
        return full_tensor(self.optim.clip(self.model.parameters()))

    def counters(self) -> dict[str, float]:
        """Return values to log besides the means, those that the data module has counted since the last call."""
        data = getattr(self.trainer, "datamodule", None)
        return data.counters() if isinstance(data, PreferenceDataModule) else {}

    def dummy_loss(self) -> Tensor:
        """Return a differentiable loss of 0, from a response of one token."""
        return 0 * dummy_nll(self.model)

    def dummy_score(self) -> None:
        """Run the passes of validate_part without a part."""
        self.dummy_loss()

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
        self.prepare_step(parts)
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
        total, norm = torch.stack(losses).sum(), self.clip_gradients_to_norm()
        if self._scaler is None:
            total = total + norm
        if self._any_rank(~torch.isfinite(total)):
            self._raise_not_finite(parts, losses)
        optimizer.step()
        if self.casts is not None:
            self.casts.refresh()
        self.finish_step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self.log_means(self.train_metrics, "train/", self.counters())

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        parts = batch.split(self.tokens_per_microbatch)
        for _ in self.dummy_passes(len(parts)):
            self.dummy_score()
        for part in parts:
            self.validate_part(part)
        self._agree_to_stop()

    def on_validation_epoch_end(self) -> None:
        self.log_means(self.val_metrics, "val/", {})

    def on_train_start(self) -> None:
        for model in self.trained_models():  # else DPO's loss at step 0 is not ln 2, and losses depend on micro-batches
            disable_dropout(model)
        self._install_signal_handlers()
        if isinstance(self.trainer.precision_plugin, MixedPrecision) and not self._is_sharded:
            saves_memory = any(getattr(each, "gradient_checkpointing", False) for each in self.model.modules())
            self.casts = LinearCasts(self.models(), keeps_copies=not saves_memory).install()

    def on_validation_start(self) -> None:
        self._install_signal_handlers()

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: PairBatch, batch_idx: int) -> None:
        self._stop_if_asked()

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: PairBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_if_asked()

    def on_train_end(self) -> None:
        if self.casts is not None:
            self.casts.remove()
        self._agree_to_stop()
        self._stop_if_asked()

    def build_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        """Return the optimizer of what is trained, and its schedule."""
        return self.optim.build(self.model.parameters(), self.total_steps)

    def configure_optimizers(self):
        optimizer, schedule = self.build_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of the module without its frozen weights, which a checkpoint does not need."""
        state = super().state_dict(*args, **kwargs)
        for name in self._frozen(state):
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of the module and leave its frozen weights as they are, also if `state_dict` holds them."""
        frozen = self._frozen(state_dict)
        trained = {name: tensor for name, tensor in state_dict.items() if name not in frozen}
        missing, unexpected = super().load_state_dict(trained, strict=False, assign=assign)
        missing = sorted({*missing} - self._frozen(missing))
        if strict and (missing or unexpected):
            raise RuntimeError(f"the checkpoint is of other weights: Missing keys: {missing}; unexpected: {unexpected}")
        return missing, unexpected

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
            self._any_rank(None)

    def _stop_if_asked(self) -> None:
        if self.stopping and self.request is not None:
            self.request.raise_or_requeue(self.stopping)

    def _any_rank(self, flag: Tensor | None) -> bool:
        """Return whether the flag is set on any rank; set `stopping` in the same collective.

        This is where a step waits for a GPU, the only time.
        """
        signum = (self.request and self.request.signum) or 0
        if self.trainer.world_size == 1:
            self.stopping = signum
            return flag is not None and bool(flag)
        first = torch.zeros((), dtype=torch.long, device=self.device) if flag is None else flag.long()
        message = torch.stack((first, torch.full_like(first, signum)))
        distributed.all_reduce(message, distributed.ReduceOp.MAX)  # Lightning's `reduce` waits at a barrier before it
        is_set, self.stopping = message.tolist()
        return bool(is_set)

    def _raise_not_finite(self, parts: Sequence[PairBatch], losses: Sequence[Tensor]) -> None:
        """Raise NotFinite on every rank, naming the pairs of all ranks whose loss or gradient is not finite."""
        parameters = [] if self._is_sharded else [p for p in self.model.parameters() if p.requires_grad]
        pairs = all_gather_object(nonfinite_pairs(parts, losses, self.part_loss, parameters))
        raise not_finite(self.global_step + 1, pairs, Path(self.trainer.default_root_dir) / CHECKPOINTS)

    def _frozen(self, names: Iterable[str]) -> set[str]:
        """Return which names of state are of weights that are not trained: under adapters, of the base.

        The scales of a quantized weight are named after it: NAME.absmax.
        """
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name for name in names if name in frozen or f"{name.partition('.weight.')[0]}.weight" in frozen}

    @property
    def _is_sharded(self) -> bool:
        """Whether the model is sharded over ranks, so that all ranks have to run each forward pass together."""
        return getattr(self.trainer.strategy, "shards_model", False)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of float16, which skips steps of infinite gradients until it has found a scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
