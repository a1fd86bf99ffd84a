"""Find numbers that are not finite before a step applies them, and the pairs that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_lab.core.pairs import PairBatch
from dpo_lab.runs.run_record import RunFailed
from dpo_lab.training.checkpoint_io import by_step


class NotFinite(RunFailed):
    """Raised where a reward, a loss, a gradient or a weight is NaN or infinite, before it is applied or saved."""


def nonfinite_pairs(
    parts: Sequence[PairBatch],
    losses: Sequence[Tensor],
    part_loss: Callable[[PairBatch], Tensor],
    parameters: Sequence[nn.Parameter],
) -> list[str]:
    """Return the keys of the pairs of a batch whose loss is not finite or, if all losses are finite, whose gradient is
    not.

    losses: the losses of the parts in the failed step. Pairs are computed one by one; if each is finite on its own, all
    pairs of the part are returned. Without `parameters` (where a rank can't run a backward pass on its own) all pairs
    of the parts whose loss is not finite are returned.
    """
    bad_parts = [part for part, loss in zip(parts, losses, strict=True) if not torch.isfinite(loss)]
    if not parameters:
        return [key for part in bad_parts for key in part.keys]
    with torch.no_grad():
        keys = [key for part in bad_parts for key in _one_by_one(part, lambda one: not torch.isfinite(part_loss(one)))]
    if bad_parts:
        return keys or [key for part in bad_parts for key in part.keys]

    def has_bad_gradient(one: PairBatch) -> bool:
        # does not write to .grad and does not synchronise ranks
        gradients = torch.autograd.grad(part_loss(one), parameters, allow_unused=True)
        return not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)

    return [key for part in parts for key in _one_by_one(part, has_bad_gradient)]


def _one_by_one(part: PairBatch, is_bad: Callable[[PairBatch], bool]) -> Iterator[str]:
    return (one.keys[0] for one in part.split(0) if is_bad(one))


def not_finite(step: int, pairs: Sequence[Sequence[str]], checkpoints: Path) -> NotFinite:
    """Return the error of a step (the first is 1). pairs: for each rank the keys of its pairs that are not finite."""
    named = [
        f"{f'rank {rank}, ' if len(pairs) > 1 else ''}{'pair' if len(keys) == 1 else 'pairs'} {', '.join(keys)}"
        for rank, keys in enumerate(pairs)
        if keys
    ]
    saved = list(by_step(checkpoints).values())
    return NotFinite(
        f"step {step}: the loss or its gradient is not finite"
        f" ({'; '.join(named) or 'no single pair is the cause'}). The step was not applied;"
        f" the last checkpoint before it is {saved[-1] if saved else 'none yet'}."
        " Type a lower optim.lr, or trainer.precision=32-true, or look at the pairs with python -m dpo_lab.inspect"
    )


def all_finite(values: Any) -> bool:
    """Return whether every tensor in nested containers is finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return True
    return all(map(all_finite, values))
