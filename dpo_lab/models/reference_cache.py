"""The cache of reference log-probabilities: one safetensors file per (weights, numerics, pairs), verified on every
read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps, chunk_by_size, to_device
from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.numerics import numerics_of
from dpo_lab.models.passes import cached_by_ranks, map_passes
from dpo_lab.models.policy import weights_digest
from dpo_lab.models.sharding import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "5"  # increase it when a change of the code changes the cached numbers


@dataclass
class CachedLogps:
    """Reference log-probabilities by pair key. rows [N, 2]: chosen and rejected as annotated, before label noise; keys
    [N]: the keys of the pairs, sorted; at [N]: the row of each key.
    """

    rows: Tensor
    keys: np.ndarray
    at: np.ndarray
    path: Path

    def __call__(self, batch: PairBatch) -> PairLogps:
        keys = np.array([key.encode() for key in batch.keys])
        indices = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        if (missing := self.keys[indices] != keys).any():
            key = batch.keys[int(missing.argmax())]
            raise KeyError(f"pair {key} has no row in the reference cache {self.path}; delete the file")
        first, second = to_device(self.rows[self.at[indices]], batch.tokens.device).unbind(1)
        chosen = torch.where(batch.flipped, second, first)
        rejected = torch.where(batch.flipped, first, second)
        return PairLogps(chosen, rejected, *batch.response_lengths.unbind(1))


def cached_logps(
    initial: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    folder: Path,
    context: Callable[[], AbstractContextManager],
    tokens: int,
) -> CachedLogps:
    """Return the cached log-probabilities of these pairs under this model, from `folder` or computed and stored there.

    tokens: approximate number of tokens per forward pass. A collective: each rank computes its share of the forward
    passes, whose batches do not depend on the number of ranks, so that the file is that of one process.
    """
    table = pairs if isinstance(pairs, PairTable) else PairTable.of(pairs)
    table = table.flip(table.flipped)
    key = _cache_key(weights_digest(initial), f"{FORMAT} {numerics_of(initial, context)}", table)
    path = folder / f"reference-{key[:16]}.safetensors"

    def make() -> bytes:
        return save({"logps": _compute(initial, table, context, tokens)})

    rows = load(cached_by_ranks(path, make))["logps"]
    order = np.argsort(table.keys, kind="stable")
    return CachedLogps(rows, table.keys[order], order, path)


def _cache_key(weights: str, numerics: str, pairs: PairTable) -> str:
    digest = hashlib.blake2b(f"{weights} {numerics}".encode(), digest_size=16)
    digest.update(pairs.keys.tobytes())
    digest.update(pairs.lengths.tobytes())
    for start, size in zip(pairs.starts.tolist(), pairs.sizes.tolist(), strict=True):
        digest.update(pairs.tokens[start : start + size].tobytes())
        if pairs.scored is not None:
            digest.update(pairs.scored[start : start + size].tobytes())
    if pairs.tail_weight != 1:
        digest.update(f"tail {pairs.tail_weight!r}".encode())
    return digest.hexdigest()


@torch.no_grad()
def _compute(
    model: PreTrainedModel, pairs: PairTable, context: Callable[[], AbstractContextManager], tokens: int
) -> Tensor:
    order = np.argsort(pairs.sizes, kind="stable")
    was_training = model.training
    model.eval()
    device = device_of(model)
    parts = [order[chunk] for chunk in chunk_by_size(pairs.sizes[order].tolist(), tokens)]

    def compute(indices: np.ndarray) -> Tensor:
        with context():
            logps = pair_logps(model, collate([pairs[int(i)] for i in indices]).to(device))
        return torch.stack((logps.chosen, logps.rejected), 1).float().cpu()

    work = [int(pairs.sizes[part].sum()) for part in parts]
    computed = map_passes("Reference log-probs", model, parts, work, compute, [len(part) for part in parts])
    rows = torch.empty(len(pairs), 2)
    for indices, logps in zip(parts, computed, strict=True):
        rows[torch.from_numpy(indices)] = logps
    model.train(was_training)
    if not rows.isfinite().all():
        bad = pairs.key(int((~rows.isfinite()).any(1).nonzero()[0]))
        raise ValueError(f"pair {bad}: its reference log-probability is not finite; the initial policy is broken")
    return rows
