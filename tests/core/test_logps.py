"""Log-probabilities: worked numbers, padding by hand, and a brute-force twin, one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpo_lab.core.logps import IGNORE, pad_rows, sequence_logps, stream_rows
from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import EncodedPair, PairLogps, chunk_by_size
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.models.forward import pair_logps
from tests.conftest import make_pairs


def logits_with(token_logps: list[float], labels: list[int], vocabulary: int = 6) -> torch.Tensor:
    """Logits [1, T, V] that give token_logps[t] to the label that stands at t + 1."""
    logits = torch.full((1, len(labels), vocabulary), 0.0, dtype=torch.float64)
    for t, (logp, label) in enumerate(zip(token_logps, [*labels[1:], 0], strict=True)):
        rest = (1 - math.exp(logp)) / (vocabulary - 1)
        logits[0, t] = math.log(rest)
        logits[0, t, max(label, 0)] = logp
    return logits


@pytest.mark.parametrize(
    ("labels", "total", "count"),
    [([0, 1, 2, 3], -6.0, 3), ([0, 1, 2, IGNORE], -3.0, 2), ([IGNORE] * 4, 0.0, 0)],
)
def test_worked_numbers(labels, total, count):
    sums, counts = sequence_logps(logits_with([-1, -2, -3, -4], labels), torch.tensor([labels]))
    assert sums.item() == pytest.approx(total)
    assert counts.item() == count


def test_rows_without_labels_stand_beside_rows_with_them():
    logits = torch.zeros(2, 3, 16)
    sums, counts = sequence_logps(logits, torch.tensor([[IGNORE, IGNORE, IGNORE], [IGNORE, 3, 4]]))
    assert sums.tolist() == pytest.approx([0.0, -2 * math.log(16)])
    assert counts.tolist() == [0, 2]


def test_zero_logits_give_ln_2_and_the_stated_nll():
    labels = torch.tensor([[IGNORE, 5, 6], [IGNORE, 7, 8]])
    sums, counts = sequence_logps(torch.zeros(2, 3, 16), labels)
    logps = PairLogps(*sums.split(1), *counts.split(1))
    loss = DPO(0.1)(logps, logps)
    assert loss.item() == pytest.approx(math.log(2))
    assert (loss - 0.5 * logps.chosen).item() == pytest.approx(3.465736, abs=1e-6)


def test_half_precision_logits_are_summed_in_full():
    logits = torch.randn(2, 400, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(0, 50, (2, 400), generator=torch.Generator().manual_seed(1))
    sums, _ = sequence_logps(logits, labels)
    exact, _ = sequence_logps(logits.double(), labels)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx(exact.tolist(), rel=1e-5)


def test_pad_rows_as_documented():
    batch = collate([EncodedPair("a", [1, 2], [7], [8, 9]), EncodedPair("b", [3], [4, 5], [6])])
    input_ids, labels = pad_rows(batch.tokens, batch.lengths, pad_id=0)
    assert input_ids.tolist() == [[1, 2, 7, 0], [3, 4, 5, 0], [1, 2, 8, 9], [3, 6, 0, 0]]
    ignored = IGNORE
    assert labels.tolist() == [
        [ignored, ignored, 7, ignored],
        [ignored, 4, 5, ignored],
        [ignored, ignored, 8, 9],
        [ignored, 6, ignored, ignored],
    ]


def test_single_responses_are_laid_out_as_pairs_are():
    pairs = make_pairs(5, seed=2)
    batch = collate(pairs)
    of_pairs = pad_rows(batch.tokens, batch.lengths, pad_id=0)
    single = collate_responses([p.prompt for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    assert [t.tolist() for t in pad_rows(*single, pad_id=0)] == [t.tolist() for t in of_pairs]


def test_stream_rows_as_documented():
    batch = collate([EncodedPair("a", [1, 2], [7], [8, 9]), EncodedPair("b", [3], [4, 5], [6])])
    stream = stream_rows(batch.tokens, batch.lengths)
    assert stream.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 1]
    assert stream.rows.tolist() == [1, 1, 3, 5, 6, 5]  # a prompt's last row predicts both responses' first tokens
    assert stream.targets.tolist() == [7, 8, 9, 4, 5, 6]


def test_a_stream_without_the_last_token_of_each_response():
    """One response has a token, one none: of a pair with one side."""
    batch = collate([EncodedPair("a", [1, 2], [7], [8, 9]), EncodedPair("b", [3], [4, 5, 6], [])])
    stream = stream_rows(batch.tokens, batch.lengths, keeps_last=False)
    assert stream.tokens.tolist() == [1, 2, 8, 3, 4, 5]
    assert stream.lengths.tolist() == [[2, 0, 1], [1, 2, 0]]
    assert stream.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert stream.rows.tolist() == [1, 1, 2, 3, 4, 5]
    assert stream.targets.tolist() == [7, 8, 9, 4, 5, 6]


def test_cut():
    assert chunk_by_size([3, 4, 2, 9, 1], 7) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert chunk_by_size([], 7) == []


def test_a_batch_splits_into_its_pairs():
    pairs = make_pairs(9, seed=4)
    for tokens in (1, 60, 10_000):
        parts = collate(pairs).split(tokens)
        assert [key for part in parts for key in part.keys] == [p.key for p in pairs]
        assert torch.equal(torch.cat([part.tokens for part in parts]), collate(pairs).tokens)
        assert np.array_equal(np.concatenate([part.lengths for part in parts]), collate(pairs).lengths)
        assert all(len(part) == 1 or len(part.tokens) <= tokens for part in parts)
        assert all(int(part.lengths.sum()) == len(part.tokens) for part in parts)


def brute_force(model, prompt, response) -> float:
    """log p(response | prompt), a token at a time, nothing padded, nothing batched."""
    total, seen = 0.0, list(prompt)
    for token in response:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        seen.append(token)
    return total


def test_pair_logps_against_brute_force(policy):
    pairs = make_pairs(6, seed=3)
    with torch.no_grad():
        logps = pair_logps(policy.model, collate(pairs))
    assert logps.chosen.tolist() == pytest.approx(
        [brute_force(policy.model, p.prompt, p.chosen) for p in pairs], rel=1e-5
    )
    assert logps.rejected.tolist() == pytest.approx(
        [brute_force(policy.model, p.prompt, p.rejected) for p in pairs], rel=1e-5
    )
    assert logps.chosen_length.tolist() == [len(p.chosen) for p in pairs]
    assert logps.rejected_length.tolist() == [len(p.rejected) for p in pairs]


def test_end_token_is_scored_even_where_it_is_the_pad_token(policy):
    pad = policy.model.config.pad_token_id
    pairs = [EncodedPair("a", [5, 6], [7, pad], [8]), EncodedPair("b", [5], [7, 9, 10, pad], [8])]
    with torch.no_grad():
        logps = pair_logps(policy.model, collate(pairs))
    assert logps.chosen[0].item() == pytest.approx(brute_force(policy.model, [5, 6], [7, pad]), rel=1e-5)
    assert logps.chosen_length.tolist() == [2, 4]


def test_a_pair_does_not_depend_on_its_batch(policy, pairs):
    with torch.no_grad():
        together = pair_logps(policy.model, collate(pairs)).chosen
        alone = torch.cat([pair_logps(policy.model, collate([p])).chosen for p in pairs])
    assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-5)


def test_flipping_a_pair_swaps_its_sides(policy, pairs):
    with torch.no_grad():
        as_is, flipped = (pair_logps(policy.model, collate(ps)) for ps in (pairs, [p.flip() for p in pairs]))
    assert flipped.chosen.tolist() == pytest.approx(as_is.rejected.tolist(), rel=1e-5)
    assert flipped.margin.tolist() == pytest.approx((-as_is.margin).tolist(), rel=1e-4, abs=1e-4)
