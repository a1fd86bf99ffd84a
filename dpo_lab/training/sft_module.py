"""The LightningModule of supervised fine-tuning: the negative log-likelihood of the chosen responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from dpo_lab.core.metrics import FixedDtypeMetric
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.forward import response_logps, response_nll
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.optim import Optim


class SFTModule(BaseModule):
    """Trains `model` on chosen responses; the loss is averaged over all response tokens that a step has on all ranks.

    So every scored token has the same weight. Batches hold pairs with an empty rejected response, see PairTable.chosen_only.
    """

    title = "SFT"

    def __init__(self, model: PreTrainedModel, optim: Optim, *, total_steps: int, tokens_per_microbatch: int) -> None:
        super().__init__(model, optim, TokenLoss, total_steps=total_steps, tokens_per_microbatch=tokens_per_microbatch)
        self.tokens = 0  # number of tokens trained on

    def normalizer(self, batch: PairBatch) -> int:
        tokens = int(batch.scored_lengths[:, 0].sum())
        if self.trainer.world_size > 1:
            of_ranks = torch.full((), tokens, device=self.device)
            distributed.all_reduce(of_ranks)
            tokens = int(of_ranks)  # with more ranks than one a step waits once more
        self.tokens += tokens
        return tokens

    def counters(self) -> dict[str, float]:
        return {"tokens": float(self.tokens)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]

    def part_loss(self, part: PairBatch) -> Tensor:
        nll = response_nll(self.model, part.tokens, part.lengths[:, :2], part.weights)
        self.train_metrics.update(nll.detach(), part)
        return nll

    def validate_part(self, part: PairBatch) -> None:
        logps = response_logps(self.model, part.tokens, part.lengths[:, :2], part.weights)
        self.val_metrics.update(-logps.sum(), part)


class TokenLoss(FixedDtypeMetric):
    """Mean negative log-likelihood per response token, in nats, over all batches and ranks."""

    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, batch: PairBatch) -> None:
        """Add a batch. nll: negative log-likelihood in nats, summed over its chosen responses."""
        self.nats += nll.double()
        self.tokens += int(batch.scored_lengths[:, 0].sum())

    def compute(self) -> dict[str, float]:
        return {"loss": (self.nats / self.tokens).item()}
