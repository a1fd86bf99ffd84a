"""Step 0: before anything is trained, policy and reference must agree; where they need not, how far apart they start."""

from __future__ import annotations

import torch

from dpo_lab.core.losses import Loss
from dpo_lab.core.metrics import half_ties
from dpo_lab.core.pairs import PairBatch
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.reference import ReferenceLogps

# How far two valid computations of a response's log-probability lie apart at most, in nats: this much for a response of one
# token, and for n tokens sqrt(n) times as much. Measured by benchmarks/step_zero.py, with its margin.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class StepZeroError(RuntimeError):
    """Policy and reference differ before the first step: the run would measure something else."""


@torch.no_grad()
def check_step_zero(model, loss: Loss, reference: ReferenceLogps, batch: PairBatch, tokens: int = TOKENS) -> float:
    """Return the mean loss of a batch before the first step; with DPO it is ln 2, with a term that does not compare (see RPO)
    more. The batch is forwarded `tokens` at a time, as a step's micro-batches and the reference cache are.

    Raises StepZeroError, naming the worst pair, where the policy's log-probability of a response is not the reference's.
    """
    parts = batch.split(tokens)
    scored = [(pair_logps(model, part), reference(part)) for part in parts]
    computing = _computing(batch.tokens.device)
    off = torch.cat([_off(policy, of_reference, computing) for policy, of_reference in scored])
    if not (off <= 1).all():
        raise StepZeroError(_worst(off, batch, scored, computing) + _remedy(reference))
    if computing != torch.float32 and (wrong := _reference_in_float32(model, parts[0], *scored[0])):
        raise StepZeroError(wrong + _remedy(reference))
    return torch.cat([loss(policy, of_reference) for policy, of_reference in scored]).mean().item()


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
