"""The step-0 check: before training, policy and reference must agree; where they need not, measure how far apart they
start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import half_ties
from dpo_lab.core.pairs import PairBatch, PairLogps
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.reference import TOKENS, ReferenceLogps
from dpo_lab.runs.run_record import RunFailed

# By how many nats a token two valid computations of a response's log-probability may differ, if it has one token; if it has
# n tokens, by 1 / sqrt(n) of it, as their rounding errors average out. By the dtype that matrix products are computed in.
# At least twice the largest difference that benchmarks/STEP_ZERO.md shows; of float64 and float16 by their rounding alone.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.8, torch.float16: 0.1}


class StepZeroError(RunFailed):
    """Policy and reference differ before the first step: the run would measure something else."""


@torch.no_grad()
def check_step_zero(model, loss: Loss, reference: ReferenceLogps, batch: PairBatch, tokens: int = TOKENS) -> float:
    """Return the mean loss of a batch before the first step; with DPO it is ln 2, with a term that does not compare (see RPO)
    more. The batch is forwarded `tokens` at a time, as the reference cache was.

    Raises StepZeroError, naming the worst pair, where the policy's log-probability of a response is not the reference's.
    """
    parts = batch.split(tokens)
    policy = _joined([pair_logps(model, part) for part in parts])
    of_reference = _joined([reference(part) for part in parts])
    dtype = _computes_in(model)
    error = _over_tolerance(policy, of_reference, batch.keys, dtype)
    if error is None and dtype is not torch.float32 and model.dtype is torch.float32:
        error = _reference_in_float32(model, parts[0], policy, of_reference, dtype)
    if error is not None:
        path = getattr(reference, "path", None)
        remedy = f"; remove {path}, which will be computed anew" if path is not None else ""
        raise StepZeroError(f"before the first step policy and reference differ: {error}{remedy}")
    return loss(policy, of_reference).mean().item()


@torch.no_grad()
def first_batch(
    model, loss: Loss, reference: ReferenceLogps, batch: PairBatch, tokens: int = TOKENS
) -> dict[str, float]:
    """Loss, accuracy and number of pairs of a batch before the first step, against a reference that need not agree."""
    parts = batch.split(tokens)
    policy = _joined([pair_logps(model, part) for part in parts])
    of_reference = _joined([reference(part) for part in parts])
    margins = loss.log_ratios(policy, of_reference).margin
    return {
        "loss": loss(policy, of_reference).mean().item(),
        "accuracy": half_ties(margins).mean().item(),
        "pairs": len(margins),
    }


def _over_tolerance(policy: PairLogps, reference: PairLogps, keys: Sequence[str], dtype: torch.dtype) -> str | None:
    """Say by how much the worst pair's log-probabilities differ, where that is more than rounding; None where it is not."""
    off, lengths = _differences(policy, reference)
    limits = TOLERANCE[dtype] / lengths.sqrt()
    worst = int((off / limits).nan_to_num(torch.inf).argmax())
    if off[worst] <= limits[worst]:
        return None
    return (
        f"pair {keys[worst // 2]}, {('chosen', 'rejected')[worst % 2]} response of {lengths[worst]:.0f} tokens: its"
        f" log-probability differs by {off[worst]:.2g} nats a token (tolerance of {str(dtype).removeprefix('torch.')}:"
        f" {limits[worst]:.2g}); the reference is not the initial policy, or the two are computed differently"
    )


def _reference_in_float32(
    model, part: PairBatch, policy: PairLogps, reference: PairLogps, dtype: torch.dtype
) -> str | None:
    """Say so where the reference is what the model gives in float32, though the policy computes in 16 bits.

    The two differ by less than two valid paths in 16 bits do, but by the same amount in every step: a bias.
    """
    policy, reference = policy[: len(part)], reference[: len(part)]
    if _over_tolerance(policy, reference, part.keys, torch.float32) is None:
        return None
    with torch.autocast(part.tokens.device.type, enabled=False):
        exact = pair_logps(model, part)
    if _over_tolerance(exact, reference, part.keys, torch.float32) is not None:
        return None
    return f"the reference was computed in float32, the policy computes in {str(dtype).removeprefix('torch.')}"


def _differences(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """(nats a token, tokens) by which, and over how many, both responses of each pair differ, [2 B] each."""
    lengths = torch.stack((policy.chosen_length, policy.rejected_length), 1).flatten().double().clamp(min=1)
    difference = policy - reference
    return torch.stack((difference.chosen, difference.rejected), 1).flatten().double().abs() / lengths, lengths


def _joined(parts: Sequence[PairLogps]) -> PairLogps:
    chosen, rejected, chosen_length, rejected_length = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("chosen", "rejected", "chosen_length", "rejected_length")
    )
    return PairLogps(chosen, rejected, chosen_length, rejected_length)


def _computes_in(model) -> torch.dtype:
    """The dtype of a matrix product of the model's weights here, autocast included."""
    weight = torch.empty(1, 1, device=model.device, dtype=model.dtype)
    return (weight @ weight).dtype
