"""The LightningModule of DPO: log-probs, reference, loss, metrics, log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import GROUPS, PreferenceMetrics, Values, reward_margins
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.forward import dummy_nll, pair_logps, pair_loss
from dpo_lab.models.reference import MovingModel, ReferenceLogps, reference_model, score_reference
from dpo_lab.models.sharding import is_sharded
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.loggers.tensorboard import show_histogram
from dpo_lab.training.optim import Optim

SPLITS = {"train": "training", "val": "held out"}
CHARTS: dict[str, tuple[str, ...]] = {
    **BaseModule.charts,
    **{
        f"{name}/{title}: chosen and rejected": (f"{split}/{name}/chosen", f"{split}/{name}/rejected")
        for name in ("rewards", "logps")
        for split, title in SPLITS.items()
    },
    **{
        f"{name}/{title}: all, clean, flipped, truth": tuple(
            f"{split}/{group}rewards/{name}" for group in (*GROUPS, "true/")
        )
        for name in ("margins", "accuracies")
        for split, title in SPLITS.items()
    },
}


class DPOModule(BaseModule):
    """Trains `model` with `loss` against `reference`, averaged over the `batch_size` pairs that a step has on all
    ranks.

    The reference is not a submodule, so it is not synchronised and never in train mode. Its weights are in checkpoints if
    they move.
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
        sizes = dict(total_steps=total_steps, tokens_per_microbatch=tokens_per_microbatch)
        super().__init__(model, optim, PreferenceMetrics, **sizes)
        self.loss, self.reference, self.batch_size = loss, reference, batch_size
        self.val_margins = Values()

    def normalizer(self, batch: PairBatch) -> int:
        return self.batch_size

    def models(self) -> list[PreTrainedModel]:
        reference = reference_model(self.reference)
        return [self.model] if reference is None else [self.model, reference]

    def finish_step(self) -> None:
        moves = isinstance(self.reference, MovingModel) and self.reference.follow(self.model, self.global_step)
        if moves and self.casts is not None:
            self.casts.refresh(is_trained=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.reference, MovingModel):
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.reference, MovingModel):
            self.reference.load_state_dict(checkpoint["reference"])

    def dummy_loss(self) -> Tensor:
        model = reference_model(self.reference)
        if model is not None and is_sharded(model):  # its passes are run together too, each before the policy's
            with torch.no_grad():
                dummy_nll(model)
        return super().dummy_loss()

    def part_loss(self, part: PairBatch) -> Tensor:
        reference = score_reference(self.reference, part)
        loss, policy = pair_loss(self.model, part, self.loss, reference, self.loss.weighs_pairs)
        losses = policy.weigh(self.loss(policy, reference))
        self.train_metrics.update(self.loss, losses, policy, reference, part)
        return loss

    def validate_part(self, part: PairBatch) -> None:
        reference = score_reference(self.reference, part)
        policy = pair_logps(self.model, part, self.loss.weighs_pairs)
        losses = policy.weigh(self.loss(policy, reference))
        self.val_metrics.update(self.loss, losses, policy, reference, part)
        self.val_margins.update(reward_margins(self.loss, policy, reference))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        margins = self.val_margins.compute()
        self.val_margins.reset()
        if not self.trainer.sanity_checking:
            show_histogram(self.trainer, "val/margins", margins, self.global_step)
