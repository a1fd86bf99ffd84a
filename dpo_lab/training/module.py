"""DPO as a LightningModule: log-probs, reference, loss, metrics, log."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import PreferenceMetrics
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.policy import pair_logps
from dpo_lab.models.reference import ReferenceLogps
from dpo_lab.training.optim import Optim


class DPOModule(LightningModule):
    """Trains `model` by `loss` against `reference`.

    The reference is no submodule: it stays out of checkpoints, out of parameter sync and out of train mode.
    """

    def __init__(
        self, model: PreTrainedModel, loss: Loss, reference: ReferenceLogps, optim: Optim, total_steps: int
    ) -> None:
        super().__init__()
        self.model, self.loss, self.reference = model, loss, reference
        self.optim, self.total_steps = optim, total_steps
        self.train_metrics, self.val_metrics = PreferenceMetrics(), PreferenceMetrics()

    def losses(self, batch: PairBatch, metrics: PreferenceMetrics) -> Tensor:
        """One loss per pair, [B]; what there is to see goes into metrics."""
        policy = pair_logps(self.model, batch)
        reference = self.reference(batch)
        losses = self.loss(policy, reference)
        metrics.update(self.loss, losses.detach(), policy.detach(), reference, batch)
        return losses

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, self.train_metrics)
        if self._is_logging_step(batch_idx):
            self._log(self.train_metrics, "train/")
        return losses.mean()

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.losses(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log(self.val_metrics, "val/")

    def on_train_epoch_start(self) -> None:
        self.model.eval()  # dropout off in the policy as in its reference: else step 0 is not ln 2

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.model.parameters(), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _is_logging_step(self, batch_idx: int) -> bool:
        closes_a_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        log_every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        return closes_a_step and (self.global_step + 1) % log_every == 0

    def _log(self, metrics: PreferenceMetrics, split: str) -> None:
        """Log means over the pairs since the last call; `compute` has summed over ranks already."""
        for name, value in metrics.compute().items():
            self.log(split + name, value)
        metrics.reset()
