"""Collate token ids to packed streams: encoded pairs to one PairBatch, single responses to tokens and lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpo_lab.core.pair_table import flat
from dpo_lab.core.pairs import EncodedPair, PairBatch, Tokens


def collate(pairs: Sequence[EncodedPair]) -> PairBatch:
    """Collate pairs to one packed stream of tokens, without padding.

    >>> collate([EncodedPair("k", prompt=[1, 2], chosen=[7], rejected=[8, 9])])
    PairBatch(keys=["k"], tokens=[1, 2, 7, 8, 9], lengths=[[2, 1, 2]], scored_lengths=[[1, 2]], flipped=[False],
    gold_margin=[nan])   # scored_lengths and response_lengths are the same numbers
    """
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs], np.int64).reshape(-1, 3)
    scored_lengths = np.array([p.scored_lengths for p in pairs], np.int64).reshape(-1, 2)
    weighs_all_alike = all(p.scored is None and p.tail_weight == 1 for p in pairs)
    gaps = [p.score_gap for p in pairs if p.score_gap is not None]
    unrelated = [p.unrelated for p in pairs if p.unrelated is not None]
    return PairBatch(
        keys=[p.key for p in pairs],
        tokens=torch.from_numpy(flat([part for p in pairs for part in (p.prompt, p.chosen, p.rejected)])).long(),
        lengths=lengths,
        scored_lengths=scored_lengths,
        response_lengths=torch.from_numpy(scored_lengths.copy()),
        flipped=torch.tensor([p.flipped for p in pairs], dtype=torch.bool),
        gold_margin=torch.tensor([p.gold_margin for p in pairs]),
        weights=None if weighs_all_alike else torch.from_numpy(np.concatenate([p.token_weights for p in pairs])),
        score_gap=torch.tensor(gaps) if gaps else None,
        unrelated=collate(unrelated) if unrelated else None,
    )


def collate_responses(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> tuple[Tensor, np.ndarray]:
    """Collate prompts with K responses each, as many for all, to a packed stream: (tokens [N], lengths [S, 1 + K]).

    responses: the K responses to prompt 0, then those to prompt 1, ...
    """
    each = len(responses) // len(prompts)
    items = [(prompt, *responses[each * i : each * (i + 1)]) for i, prompt in enumerate(prompts)]
    tokens = torch.from_numpy(flat([part for item in items for part in item])).long()
    return tokens, np.array([[len(part) for part in item] for item in items])
