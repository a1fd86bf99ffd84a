"""The LightningModule of losses over whole steps: a pass without gradient first, then the loss made linear in each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dpo_lab.core.linear_loss import LinearLoss
from dpo_lab.core.losses.base import Loss, StepLevel
from dpo_lab.core.metrics import reward_margins
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.distributed.collectives import all_gather_object, rank_and_world_size
from dpo_lab.models.forward import pair_logps, pair_loss
from dpo_lab.models.reference import score_reference
from dpo_lab.training.dpo_module import DPOModule

Scored = tuple[PairLogps, PairLogps]  # by policy and reference


class StepLevelModule(DPOModule):
    """Trains with a loss that is a function of all pairs of a step, on all ranks, whatever micro-batches they are split into.

    The first pass takes the log-probabilities of all pairs, which ranks share; their derivatives of the step's loss are
    constants in the second, which is that of a loss of single pairs. So a step has one more forward pass, and waits for the
    device once more. Held-out pairs are one step together, at the end of the validation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running: float | list[float] | None = None  # the running mean that the loss takes
        self.linear: dict[int, LinearLoss] = {}  # of the step's micro-batches, by identity
        self.held_out: list[tuple[PairBatch, Scored]] = []

    def prepare_step(self, parts: Sequence[PairBatch]) -> None:
        with torch.no_grad():
            for _ in self.dummy_passes(len(parts)):
                self.dummy_score()
            scored = [self._score(part) for part in parts]
        linear = self._linearize(scored, is_training=True)
        starts = [sum(len(part) for part in parts[:i]) for i in range(len(parts))]
        self.linear = {id(part): linear[start : start + len(part)] for part, start in zip(parts, starts, strict=True)}

    def part_loss(self, part: PairBatch) -> Tensor:
        linear, reference = self.linear.get(id(part)), self.reference(part)
        if linear is None:  # a pair on its own, where the one that is not finite is looked for
            return super().part_loss(part)
        loss, policy = pair_loss(self.model, part, lambda policy, linear: linear(policy), linear)
        self.train_metrics.update(self.loss, linear.losses, policy, reference, part)
        return loss

    def validate_part(self, part: PairBatch) -> None:
        self.held_out.append((part, self._score(part)))

    def dummy_score(self) -> None:
        for _ in range(1 + self.loss.needs_unrelated):
            self.dummy_loss()

    def on_validation_epoch_end(self) -> None:
        scored, self.held_out = self.held_out, []
        losses = self._linearize([each for _, each in scored], is_training=False).losses
        for (part, (policy, reference)), found in zip(
            scored, losses.split([len(part) for part, _ in scored]), strict=True
        ):
            self.val_metrics.update(self.loss, found, policy, reference, part)
            self.val_margins.update(reward_margins(self.loss, policy, reference))
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["running"] = self.running

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.running = checkpoint["running"]

    def _score(self, part: PairBatch) -> Scored:
        reference = score_reference(self.reference, part)  # first, as in a dummy pass
        policy = pair_logps(self.model, part)
        if part.unrelated is None:
            return policy, reference
        by_reference, by_policy = self.reference(part.unrelated), pair_logps(self.model, part.unrelated)
        reference, policy = (
            replace(of, unrelated=row.chosen + row.rejected)  # of which a row has one
            for of, row in ((reference, by_reference), (policy, by_policy))
        )
        return policy, reference

    def _linearize(self, scored: Sequence[Scored], is_training: bool) -> LinearLoss:
        """Return the loss of the pairs of all ranks made linear in those of this rank; update the running mean."""
        nothing = PairLogps(*[torch.zeros(0, device=self.device)] * len(fields(PairLogps)))  # without held-out pairs
        mine = tuple(PairLogps.concat(each) for each in zip(*scored, strict=True)) or (nothing, nothing)
        ranks: list[Scored] = all_gather_object(tuple(each.to("cpu") for each in mine))
        policy, reference = (PairLogps.concat(each).to(self.device) for each in zip(*ranks, strict=True))
        loss: StepLevel = self.loss  # type: ignore[assignment]
        running = loss.statistic(policy, reference)
        if running is not None and self.running is not None:
            earlier = running.new_tensor(self.running)
            running = loss.update(earlier, running) if is_training else earlier
        if running is not None and is_training:
            self.running = running.tolist()
        linear = LinearLoss.of(lambda logps: loss(logps, reference, running), policy)
        is_finite = (policy.margin - reference.margin).isfinite()
        linear.losses = linear.losses.masked_fill(~is_finite, torch.nan)  # sorted, it would be another pair's
        start = sum(len(each.chosen) for each, _ in ranks[: rank_and_world_size()[0]])
        return linear[start : start + len(mine[0].chosen)]


def module_for(loss: Loss) -> Callable[..., DPOModule]:
    """Return the LightningModule that trains with a loss."""
    return StepLevelModule if loss.is_step_level else DPOModule
