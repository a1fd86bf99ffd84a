"""The LightningModule of DPO: log-probs, reference, loss, metrics, log."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.histogram import Histogram
from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import GROUPS, PreferenceMetrics, reward_margins
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.models.forward import pair_logps, pair_loss
from dpo_lab.models.reference import ReferenceLogps
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.loggers.tensorboard import show_histogram
from dpo_lab.training.optim import Optim

SPLITS = {"train": "training", "val": "held out"}
CHARTS: dict[str, tuple[str, ...]] = {
    **BaseModule.charts,
    **{
        f"{thing}/{title}: chosen and rejected": (f"{split}/{thing}/chosen", f"{split}/{thing}/rejected")
        for thing in ("rewards", "logps")
        for split, title in SPLITS.items()
    },
    **{
        f"{thing}/{title}: all, clean, flipped, truth": tuple(
            f"{split}/{group}rewards/{thing}" for group in (*GROUPS, "true/")
        )
        for thing in ("margins", "accuracies")
        for split, title in SPLITS.items()
    },
}


class DPOModule(BaseModule):
    """Trains `model` by `loss` against `reference`: by the mean over the `batch_size` pairs of a step, all ranks' together.

    The reference is no submodule: it stays out of checkpoints, out of parameter sync and out of train mode.
    """

    title, charts = "DPO", CHARTS
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
        self.val_margins = Histogram()

    def size(self, batch: PairBatch) -> int:
        return self.batch_size

    def part_loss(self, part: PairBatch) -> Tensor:
        reference = self.reference(part)
        loss, policy = pair_loss(self.model, part, self.loss, reference)
        self._see(self.train_metrics, policy, reference, part)
        return loss

    def validate_part(self, part: PairBatch) -> None:
        policy, reference = pair_logps(self.model, part), self.reference(part)
        self._see(self.val_metrics, policy, reference, part)
        self.val_margins.update(reward_margins(self.loss, policy, reference))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        counted = self.val_margins.compute()
        self.val_margins.reset()
        if not self.trainer.sanity_checking:
            show_histogram(self.trainer, "val/margins", counted, self.global_step)

    def _see(self, metrics: PreferenceMetrics, policy: PairLogps, reference: PairLogps, batch: PairBatch) -> None:
        metrics.update(self.loss, self.loss(policy, reference), policy, reference, batch)
