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
from dpo_lab.models.reference import TOKENS, ReferenceLogps, score_reference
from dpo_lab.models.sharding import device_of, is_sharded
from dpo_lab.runs.run_record import RunFailed

# Tolerance in nats per token between two valid computations of a one-token response's log-probability; for n tokens it
# is divided by sqrt(n), since rounding errors average out. Keyed by the dtype of matrix products. At least twice the
# largest difference in benchmarks/STEP_ZERO.md; for float64 and float16 derived from their rounding error.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.8, torch.float16: 0.1}


class StepZeroError(RunFailed):
    """Raised where policy and reference differ before the first step."""


@torch.no_grad()
def check_step_zero(model, loss: Loss, reference: ReferenceLogps, batch: PairBatch, tokens: int = TOKENS) -> float:
    """Return the mean loss of a batch before the first step: ln 2 for DPO, more for losses with a further term (see
    RPO).

    Forward passes take `tokens` tokens at a time, as for the reference cache. Raises StepZeroError, naming the worst
    pair, where the log-probabilities of a response under policy and reference differ.
    """
    parts = batch.split(tokens)
    policy_logps, reference_logps = _logps(model, reference, parts)
    dtype = _matmul_dtype(model)
    error = _over_tolerance(policy_logps, reference_logps, batch.keys, dtype)
    can_be_exact = model.dtype is torch.float32 and not is_sharded(
        model
    )  # a sharded one gathers its weights in 16 bits
    if error is None and dtype is not torch.float32 and can_be_exact:
        error = _reference_in_float32(model, parts[0], policy_logps, reference_logps, dtype)
    if error is not None:
        path = getattr(reference, "path", None)
        remedy = f"; remove {path}, it will be recomputed" if path is not None else ""
        raise StepZeroError(f"before the first step policy and reference differ: {error}{remedy}")
    return loss(policy_logps, reference_logps).mean().item()


@torch.no_grad()
def first_batch(
    model, loss: Loss, reference: ReferenceLogps, batch: PairBatch, tokens: int = TOKENS
) -> dict[str, float]:
    """Return loss, accuracy and number of pairs of a batch before the first step, for a reference that may differ."""
    policy_logps, reference_logps = _logps(model, reference, batch.split(tokens))
    margins = loss.scores(policy_logps, reference_logps).margin
    return {
        "loss": loss(policy_logps, reference_logps).mean().item(),
        "accuracy": half_ties(margins).mean().item(),
        "pairs": len(margins),
    }


def _logps(model, reference: ReferenceLogps, parts: Sequence[PairBatch]) -> tuple[PairLogps, PairLogps]:
    """Return the log-probabilities of all parts under policy and reference, by one forward pass per part."""
    policy, reference_logps = (
        [pair_logps(model, part) for part in parts],
        [score_reference(reference, part) for part in parts],
    )
    return PairLogps.concat(policy), PairLogps.concat(reference_logps)


def _over_tolerance(policy: PairLogps, reference: PairLogps, keys: Sequence[str], dtype: torch.dtype) -> str | None:
    """Describe the largest difference of log-probabilities if it exceeds the tolerance; return None if it does not."""
    differences, lengths = _differences(policy, reference)
    limits = TOLERANCE[dtype] / lengths.sqrt()
    worst = int((differences / limits).nan_to_num(torch.inf).argmax())
    if differences[worst] <= limits[worst]:
        return None
    return (
        f"pair {keys[worst // 2]}, {('chosen', 'rejected')[worst % 2]} response of {lengths[worst]:.0f} tokens: its"
        f" log-probability differs by {differences[worst]:.2g} nats per token (tolerance of"
        f" {str(dtype).removeprefix('torch.')}: {limits[worst]:.2g}); the reference is not the initial policy, or the two"
        " are computed differently"
    )


def _reference_in_float32(
    model, part: PairBatch, policy: PairLogps, reference: PairLogps, dtype: torch.dtype
) -> str | None:
    """Return an error if the reference was computed in float32 while the policy computes in 16 bits, else None.

    Such a difference is smaller than that of two valid computations in 16 bits, but the same in every step: a bias.
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
    """Return absolute differences in nats per token, and lengths, of both responses of each pair, [2 B] each."""
    lengths = torch.stack((policy.chosen_length, policy.rejected_length), 1).flatten().double().clamp(min=1)
    difference = policy - reference
    return torch.stack((difference.chosen, difference.rejected), 1).flatten().double().abs() / lengths, lengths


def _matmul_dtype(model) -> torch.dtype:
    """Return the dtype of a matrix product of the model's weights, autocast included."""
    weight = torch.empty(1, 1, device=device_of(model), dtype=model.dtype)
    return (weight @ weight).dtype
