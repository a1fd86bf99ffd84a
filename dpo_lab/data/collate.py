"""Encoded pairs to one PairBatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpo_lab.core.pairs import EncodedPair, PairBatch


def collate(pairs: Sequence[EncodedPair]) -> PairBatch:
    """All tokens in one flat stream, nothing padded.

    >>> collate([EncodedPair("k", prompt=[1, 2], chosen=[7], rejected=[8, 9])])
    PairBatch(keys=["k"], tokens=[1, 2, 7, 8, 9], lengths=[[2, 1, 2]], flipped=[False], gold_margin=[nan])
    """
    return PairBatch(
        keys=[p.key for p in pairs],
        tokens=torch.tensor([t for p in pairs for part in (p.prompt, p.chosen, p.rejected) for t in part]),
        lengths=torch.tensor([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]),
        flipped=torch.tensor([p.flipped for p in pairs]),
        gold_margin=torch.tensor([p.gold_margin for p in pairs]),
    )
