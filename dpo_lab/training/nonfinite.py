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
    """A loss, a gradient or a weight is NaN or infinite; nothing was trained by it and nothing of it was saved."""


def nonfinite_pairs(
    parts: Sequence[PairBatch],
    losses: Sequence[Tensor],
    part_loss: Callable[[PairBatch], Tensor],
    parameters: Sequence[nn.Parameter],
) -> list[str]:
    """Keys of the pairs of a batch that have a loss that is not finite, or, if none has, a gradient.

    losses: of the parts, as they were trained on. Pairs are tried one by one; where each is finite alone, the whole
    part is named. Without `parameters` (none that a rank could go backward to by itself) it is the parts by their
    losses.
    """
    wrong = [part for part, loss in zip(parts, losses, strict=True) if not torch.isfinite(loss)]
    if not parameters:
        return [key for part in wrong for key in part.keys]
    with torch.no_grad():
        found = [key for part in wrong for key in _alone(part, lambda one: not torch.isfinite(part_loss(one)))]
    if wrong:
        return found or [key for part in wrong for key in part.keys]

    def explodes(one: PairBatch) -> bool:
        gradients = torch.autograd.grad(
            part_loss(one), parameters, allow_unused=True
        )  # in no parameter's .grad, no sync
        return not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)

    return [key for part in parts for key in _alone(part, explodes)]


def _alone(part: PairBatch, is_wrong: Callable[[PairBatch], bool]) -> Iterator[str]:
    return (one.keys[0] for one in part.split(0) if is_wrong(one))


def not_finite(step: int, found: Sequence[Sequence[str]], checkpoints: Path) -> NotFinite:
    """The error of a step, 1 for the first. found: the keys of each rank's culprits, none of most."""
    whose = [
        f"{f'rank {rank}, ' if len(found) > 1 else ''}{'pair' if len(keys) == 1 else 'pairs'} {', '.join(keys)}"
        for rank, keys in enumerate(found)
        if keys
    ]
    saved = list(by_step(checkpoints).values())
    return NotFinite(
        f"step {step}: the loss or its gradient is not finite"
        f" ({'; '.join(whose) or 'no pair is to blame alone'}). It was not trained on;"
        f" the last checkpoint, from before it, is {saved[-1] if saved else 'none yet'}."
        " Type a lower optim.lr, or trainer.precision=32-true, or look at the pairs with python -m dpo_lab.inspect"
    )


def all_finite(values: Any) -> bool:
    """Whether every tensor in nested plain containers is finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return True
    return all(map(all_finite, values))
