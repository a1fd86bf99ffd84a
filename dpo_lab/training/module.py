"""DPO as a LightningModule: log-probs, reference, loss, metrics, log."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from transformers import PreTrainedModel

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import PreferenceMetrics
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.models.forward import pair_logps, pair_loss, without_dropout
from dpo_lab.models.reference import ReferenceLogps
from dpo_lab.training.optim import Optim


class DPOModule(LightningModule):
    """Trains `model` by `loss` against `reference`.

    A batch is a rank's part of one optimizer step, and `batch_size` the pairs of that step over all ranks; it goes through
    the model in micro-batches of `tokens_per_microbatch`, so memory does not grow with it.
    The reference is no submodule: it stays out of checkpoints, out of parameter sync and out of train mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Loss,
        reference: ReferenceLogps,
        optim: Optim,
        *,
        total_steps: int,
        batch_size: int,
        tokens_per_microbatch: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several backwards, and only the last one syncs ranks
        self.model, self.loss, self.reference = model, loss, reference
        self.optim, self.total_steps = optim, total_steps
        self.batch_size, self.tokens_per_microbatch = batch_size, tokens_per_microbatch
        self.train_metrics, self.val_metrics = PreferenceMetrics(), PreferenceMetrics()

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        optimizer: LightningOptimizer = self.optimizers()  # type: ignore[assignment]
        share = self.trainer.world_size / self.batch_size  # sync takes the mean over ranks
        parts = batch.split(self.tokens_per_microbatch)
        for part in parts:
            reference = self.reference(part)
            with optimizer.toggle_model(sync_grad=part is parts[-1]):
                loss, policy = pair_loss(self.model, part, self.loss, reference)
                self.manual_backward(loss * share)
            self._see(self.train_metrics, policy, reference, part)
        self.optim.clip(self.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            self._log(self.train_metrics, "train/")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        for part in batch.split(self.tokens_per_microbatch):
            self._see(self.val_metrics, pair_logps(self.model, part), self.reference(part), part)

    def on_validation_epoch_end(self) -> None:
        self._log(self.val_metrics, "val/")

    def on_train_epoch_start(self) -> None:
        without_dropout(self.model)  # in the policy as in its reference: else step 0 is not ln 2

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.model.parameters(), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _see(self, metrics: PreferenceMetrics, policy: PairLogps, reference: PairLogps, batch: PairBatch) -> None:
        metrics.update(self.loss, self.loss(policy, reference), policy, reference, batch)

    def _log(self, metrics: PreferenceMetrics, split: str) -> None:
        """Log means over the pairs since the last call; `compute` has summed over ranks already."""
        for name, value in metrics.compute().items():
            self.log(split + name, value)
        metrics.reset()
