"""Step 0: before anything is trained, policy and reference must agree; where they need not, how far apart they start."""

from __future__ import annotations

import torch

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import half_ties
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.reference import ReferenceLogps

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class StepZeroError(RuntimeError):
    """Policy and reference differ before the first step: the run would measure something else."""


@torch.no_grad()
def check_step_zero(model, loss: Loss, reference: ReferenceLogps, batch: PairBatch) -> float:
    """The mean loss of a batch before the first step; with DPO it is ln 2, with a term that does not compare (see RPO) more.

    Raises StepZeroError, naming the worst pair, where the loss is not what it is of the reference itself, or a margin is not 0.
    """
    computing = (torch.empty(1, 1, device=batch.tokens.device) @ torch.empty(1, 1, device=batch.tokens.device)).dtype
    tolerance = TOLERANCE[computing]
    policy, of_reference = pair_logps(model, batch), reference(batch)
    losses = loss(policy, of_reference)
    expected = loss(of_reference, of_reference)
    margins = loss.beta * loss.log_ratios(policy, of_reference).margin
    off = torch.maximum((losses - expected).abs(), margins.abs()) / (tolerance * expected.abs().clamp(min=1))
    worst = int(off.argmax())
    if not off[worst] <= 1:
        raise StepZeroError(
            f"before the first step policy and reference differ: pair {batch.keys[worst]} has loss {losses[worst]:.6f}"
            f" (should be {expected[worst]:.6f}) and reward margin {margins[worst]:.6f} (should be 0);"
            " the reference is not the initial policy, or the two are computed differently"
        )
    return losses.mean().item()


@torch.no_grad()
def first_batch(model, loss: Loss, reference: ReferenceLogps, batch: PairBatch) -> dict[str, float]:
    """Loss, accuracy and number of pairs of a batch before the first step, against a reference that need not agree."""
    policy, of_reference = pair_logps(model, batch), reference(batch)
    margins = loss.log_ratios(policy, of_reference).margin
    return {
        "loss": loss(policy, of_reference).mean().item(),
        "accuracy": half_ties(margins).mean().item(),
        "pairs": len(margins),
    }
