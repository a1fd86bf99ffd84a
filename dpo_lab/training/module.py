"""DPO as a LightningModule: log-probs, reference, loss, metrics, log."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import PreferenceMetrics
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.models.forward import pair_logps, pair_loss
from dpo_lab.models.reference import ReferenceLogps
from dpo_lab.training.optim import Optim
from dpo_lab.training.step import StepModule


class DPOModule(StepModule):
    """Trains `model` by `loss` against `reference`: by the mean over the `batch_size` pairs of a step, all ranks' together.

    The reference is no submodule: it stays out of checkpoints, out of parameter sync and out of train mode.
    """

    title = "DPO"
    train_metrics: PreferenceMetrics
    val_metrics: PreferenceMetrics

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
        step = dict(total_steps=total_steps, tokens_per_microbatch=tokens_per_microbatch)
        super().__init__(model, optim, PreferenceMetrics, **step)
        self.loss, self.reference, self.batch_size = loss, reference, batch_size

    def size(self, batch: PairBatch) -> int:
        return self.batch_size

    def part_loss(self, part: PairBatch) -> Tensor:
        reference = self.reference(part)
        loss, policy = pair_loss(self.model, part, self.loss, reference)
        self._see(self.train_metrics, policy, reference, part)
        return loss

    def validate_part(self, part: PairBatch) -> None:
        self._see(self.val_metrics, pair_logps(self.model, part), self.reference(part), part)

    def _see(self, metrics: PreferenceMetrics, policy: PairLogps, reference: PairLogps, batch: PairBatch) -> None:
        metrics.update(self.loss, self.loss(policy, reference), policy, reference, batch)
