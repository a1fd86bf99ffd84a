"""Metrics of preference pairs: rewards, margins, accuracy; over all pairs, clean and flipped ones, and against the true
preference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dpo_lab.core.losses import Loss
from dpo_lab.core.pairs import PairBatch, PairLogps

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

# One column of the state each. Rewards include the factor beta, log-ratios do not.
LABELLED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",  # share of pairs with a positive margin; a tie counts half, see zero_out_rounding
    "rewards/ties",
    "logratio/chosen",
    "logratio/rejected",
    "logps/chosen",
    "logps/rejected",
)
TRUE = ("true/rewards/margins", "true/rewards/accuracies")  # with the response of higher gold reward as chosen
ROUNDING = 1e-6  # relative error of a float32 sum of log-probabilities
GROUPS = ("", "clean/", "flipped/")


class FixedDtypeMetric(Metric):
    """A metric whose state keeps its dtype when the module that holds it is cast, as by `module.to(bfloat16)`.

    torchmetrics ignores `half()` and `float()`, but not `to(dtype)`, which Lightning calls.
    """

    full_state_update = False

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class Values(FixedDtypeMetric):
    """All values of all batches and ranks, [N] float64, for a histogram; those that are not finite are left out."""

    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.values.append(torch.zeros(0, dtype=torch.float64, device=self.device))  # what a rank without batches gives

    @torch.no_grad()
    def update(self, values: Float[Tensor, " values"]) -> None:
        """Add values."""
        self.values.append(values.double())

    def compute(self) -> Tensor:
        values = dim_zero_cat(self.values)
        return values[values.isfinite()]


class PreferenceMetrics(FixedDtypeMetric):
    """Means over pairs: of every LABELLED quantity in every group, and of every TRUE quantity over pairs with a gold
    margin.

    Sums and counts are summed over batches and ranks, so any number of ranks gives the same means. `compute` returns
    {name: mean}, without names that no pair counts for. Pairs whose gold margin is unknown or 0 are left out of TRUE. A
    response labelled on its own counts in the means of its side, but has no margin and no accuracy.
    """

    sums: Tensor
    counts: Tensor
    true_sums: Tensor
    true_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(GROUPS), len(LABELLED), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("true_sums", torch.zeros(len(TRUE), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("true_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, loss: Loss, losses: Float[Tensor, " pairs"], policy: PairLogps, reference: PairLogps, batch: PairBatch
    ) -> None:
        """Add a batch. losses were computed by `loss` from `policy` and `reference`."""
        columns = pair_values(loss, losses, policy, reference)  # [B, K]
        groups = torch.stack((torch.ones_like(batch.flipped), ~batch.flipped, batch.flipped)).double()  # [3, B]
        counted = _counted(policy)
        self.sums += groups @ columns.masked_fill(~counted, 0)
        self.counts += groups @ counted.double()
        margins = columns[:, LABELLED.index("rewards/margins")]
        side = batch.gold_margin.double().nan_to_num(0).sign()  # 0 where the truth is unknown, or a tie
        known = side != 0
        towards_truth = torch.where(known, margins * side, 0)
        self.true_sums += torch.stack((towards_truth.sum(), (half_ties(towards_truth) * known).sum()))
        self.true_count += known.sum()

    def compute(self) -> dict[str, float]:
        means = self.sums / self.counts, self.true_sums / self.true_count
        names = [group + name for group in GROUPS for name in LABELLED] + [*TRUE]
        counts = torch.cat((self.counts.flatten(), self.true_count.repeat(len(TRUE))))
        values, counts = torch.stack((torch.cat([each.flatten() for each in means]), counts)).tolist()
        return {name: value for name, value, count in zip(names, values, counts, strict=True) if count > 0}


def _counted(policy: PairLogps) -> Bool[Tensor, "pairs quantities"]:
    """Return which pairs count for which LABELLED quantities: those that have the responses that it is about."""
    chosen, rejected = policy.chosen_length > 0, policy.rejected_length > 0
    of_side = {"loss": chosen | rejected, "chosen": chosen, "rejected": rejected}
    return torch.stack([of_side.get(name.rpartition("/")[2], chosen & rejected) for name in LABELLED], 1)


def pair_values(
    loss: Loss, losses: Float[Tensor, " pairs"], policy: PairLogps, reference: PairLogps
) -> Float64[Tensor, "pairs quantities"]:
    """Return every LABELLED quantity of every pair."""
    ratios, scores = loss.log_ratios(policy, reference), loss.scores(policy, reference)
    margins = reward_margins(loss, policy, reference)
    columns = {
        "loss": losses,
        "rewards/chosen": loss.beta * scores.chosen,
        "rewards/rejected": loss.beta * scores.rejected,
        "rewards/margins": margins,
        "rewards/accuracies": half_ties(margins),
        "rewards/ties": margins == 0,
        "logratio/chosen": ratios.chosen,
        "logratio/rejected": ratios.rejected,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    return torch.stack([columns[name].double() for name in LABELLED], 1)


def reward_margins(loss: Loss, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " pairs"]:
    """Return the reward of chosen minus that of rejected for each pair; 0 for ties, NaN where there is one response."""
    is_tie = zero_out_rounding((policy - reference).margin, policy, reference) == 0
    margins = loss.beta * loss.scores(policy, reference).margin.masked_fill(is_tie, 0.0)
    return margins.masked_fill(policy.chosen_length * policy.rejected_length == 0, torch.nan)


def zero_out_rounding(
    margins: Float[Tensor, " pairs"], policy: PairLogps, reference: PairLogps
) -> Float[Tensor, " pairs"]:
    """Set log-ratio margins to 0 where they lie within the float32 rounding error of the four log-probabilities.

    Otherwise a policy that equals its reference would prefer one of two responses at random instead of tying.
    """
    magnitude = policy.chosen.abs() + policy.rejected.abs() + reference.chosen.abs() + reference.rejected.abs()
    return margins.masked_fill(margins.abs() <= ROUNDING * magnitude, 0.0)


def half_ties(margins: Tensor) -> Tensor:
    """Return 1 where the margin is positive, 1/2 where it is 0, else 0."""
    return (margins.sign() + 1) / 2
