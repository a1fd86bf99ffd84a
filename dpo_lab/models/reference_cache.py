"""The reference cache: one safetensors file per (weights, numeric path, rows), verified, made once even by two processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps, cut
from dpo_lab.data.collate import collate
from dpo_lab.models.forward import pair_logps, path_of
from dpo_lab.models.policy import weights_digest
from dpo_lab.results.cache import once
from dpo_lab.results.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FORMAT = "2"  # to be raised whenever the numbers that a row holds would change


@dataclass
class CachedLogps:
    """Reference log-probabilities by pair key. rows [N, 2]: chosen and rejected as annotated, before label noise."""

    rows: Tensor
    index: dict[str, int]
    path: Path

    def __call__(self, batch: PairBatch) -> PairLogps:
        try:
            at = torch.tensor([self.index[key] for key in batch.keys])
        except KeyError as missing:
            raise KeyError(f"pair {missing} has no row in the reference cache {self.path}; delete the file") from None
        first, second = self.rows[at].to(batch.tokens.device).unbind(1)
        _, chosen_length, rejected_length = batch.lengths.unbind(1)
        chosen = torch.where(batch.flipped, second, first)
        rejected = torch.where(batch.flipped, first, second)
        return PairLogps(chosen, rejected, chosen_length, rejected_length)


def cached_logps(
    initial: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    folder: Path,
    context: Callable[[], AbstractContextManager],
    tokens: int,
) -> CachedLogps:
    """The cache for these pairs under this model, read from `folder` or computed, `tokens` at a time, and put there."""
    rows = {p.key: p.flip() if p.flipped else p for p in pairs}
    with context():
        probe = torch.empty(1, 1) @ torch.empty(1, 1)  # its dtype tells what matrix products run in here
    key = _cache_key(weights_digest(initial), f"{FORMAT} {path_of(initial)} {initial.dtype} {probe.dtype}", rows)
    path = folder / f"reference-{key[:16]}.safetensors"
    index = {pair_key: i for i, pair_key in enumerate(rows)}

    def make(path: Path) -> None:
        table = _compute(initial, list(rows.values()), context, tokens)
        save_file({"logps": table}, path, metadata={"key": key, "checksum": _checksum(table)})

    once(path, make, is_valid=lambda path: _read(path, key) is not None)
    table = _read(path, key)
    assert table is not None
    return CachedLogps(table, index, path)


def _cache_key(weights: str, numerics: str, rows: dict[str, EncodedPair]) -> str:
    digest = hashlib.blake2b(f"{weights} {numerics}".encode(), digest_size=16)
    for key, pair in rows.items():
        digest.update(f"{key} {list(pair.prompt)} {list(pair.chosen)} {list(pair.rejected)}".encode())
    return digest.hexdigest()


@torch.no_grad()
def _compute(
    model: PreTrainedModel,
    pairs: list[EncodedPair],
    context: Callable[[], AbstractContextManager],
    tokens: int,
) -> Tensor:
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].size)
    table = torch.empty(len(pairs), 2)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with track("Reference log-probs", len(order)) as advance:
        for part in cut([pairs[i].size for i in order], tokens):
            chosen = order[part]
            with context():
                logps = pair_logps(model, collate([pairs[i] for i in chosen]).to(device))
            table[chosen] = torch.stack((logps.chosen, logps.rejected), 1).float().cpu()
            advance(len(chosen))
    model.train(was_training)
    if not table.isfinite().all():
        bad = pairs[int((~table.isfinite()).any(1).nonzero()[0])].key
        raise ValueError(f"pair {bad}: its reference log-probability is not finite; the initial policy is broken")
    return table


def _read(path: Path, key: str) -> Tensor | None:
    """The table, or None, said loudly, where the file is not what its key and checksum say."""
    try:
        with safe_open(path, framework="pt") as file:
            table, metadata = file.get_tensor("logps").clone(), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        log.warning("reference cache %s can't be read (%s): computing it again", path, error)
        return None
    if metadata.get("key") != key or metadata.get("checksum") != _checksum(table):
        log.warning("reference cache %s does not hold what it should: computing it again", path)
        return None
    return table


def _checksum(table: Tensor) -> str:
    return hashlib.blake2b(table.numpy().tobytes(), digest_size=16).hexdigest()
