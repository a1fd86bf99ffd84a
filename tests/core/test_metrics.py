"""Metrics: hand-worked means, groups, ties, the truth; and the same numbers for any number of real ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_lab.core.losses import BCO, DPO, DPOMean, SimPO
from dpo_lab.core.metrics import PreferenceMetrics, Values, reward_margins, zero_out_rounding
from dpo_lab.core.pairs import PairBatch, PairLogps
from tests.support.ranks import run_in_ranks


def batch_of(flipped: list[bool], gold: list[float]) -> PairBatch:
    size = len(flipped)
    lengths = np.array([[1, 2, 4]] * size)
    keys, of_responses = [str(i) for i in range(size)], torch.from_numpy(lengths[:, 1:])
    flips, truth = torch.tensor(flipped), torch.tensor(gold)
    return PairBatch(keys, torch.arange(7 * size), lengths, lengths[:, 1:], of_responses, flips, truth)


def logps_of(chosen: list[float], rejected: list[float]) -> PairLogps:
    size = len(chosen)
    return PairLogps(
        torch.tensor(chosen).float(), torch.tensor(rejected).float(), torch.full((size,), 2), torch.full((size,), 4)
    )


# margins of the log-ratio: 2, 0, -4, 1; the third pair is flipped, the truth of the last is not known
POLICY, REFERENCE = logps_of([-1, -5, -6, -2], [-4, -5, -2, -8]), logps_of([-2, -5, -4, -2], [-3, -5, -4, -7])
BATCH = batch_of([False, False, True, False], [1.5, -0.5, -3.0, math.nan])


def measured(loss=None) -> dict[str, float]:
    loss = loss or DPO(0.5)
    metrics = PreferenceMetrics()
    metrics.update(loss, loss(POLICY, REFERENCE), POLICY, REFERENCE, BATCH)
    return metrics.compute()


def test_labelled_means():
    values = measured()
    assert values["rewards/margins"] == pytest.approx(0.5 * (2 + 0 - 4 + 1) / 4)
    assert values["rewards/accuracies"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert values["rewards/ties"] == pytest.approx(1 / 4)
    assert values["rewards/chosen"] == pytest.approx(0.5 * (1 + 0 - 2 + 0) / 4)
    assert values["logratio/chosen"] == pytest.approx((1 + 0 - 2 + 0) / 4)
    assert values["logratio/rejected"] == pytest.approx((-1 + 0 + 2 - 1) / 4)
    assert values["logps/chosen"] == pytest.approx(-14 / 4)
    assert values["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.5 * h)) for h in (2, 0, -4, 1)) / 4)


def test_a_side_that_a_pair_does_not_have_counts_in_no_mean():
    """Two desirable responses with rewards 1 and -2, an undesirable one with 3, the last one flipped; and a pair."""
    sides = torch.tensor([[2, 0], [2, 0], [0, 4], [2, 4]])
    policy, reference = (replace(each, chosen_length=sides[:, 0], rejected_length=sides[:, 1]) for each in ONE_SIDED)
    batch = replace(batch_of([False, False, True, False], [math.nan] * 4), response_lengths=sides)
    metrics, loss = PreferenceMetrics(), BCO(1.0)
    metrics.update(loss, torch.tensor([1.0, 2.0, 3.0, 4.0]), policy, reference, batch)
    values = metrics.compute()
    assert values["rewards/chosen"] == pytest.approx((1 - 2 + 5) / 3)
    assert values["rewards/rejected"] == pytest.approx((3 + 1) / 2)
    assert values["clean/rewards/rejected"] == pytest.approx(1)
    assert values["flipped/rewards/rejected"] == pytest.approx(3)
    assert (values["rewards/margins"], values["rewards/accuracies"]) == (4, 1)
    assert not {"flipped/rewards/chosen", "flipped/rewards/margins", "flipped/rewards/accuracies"} & values.keys()
    assert values["loss"] == 2.5
    histogram = Values()
    histogram.update(reward_margins(loss, policy, reference))
    assert histogram.compute().item() == 4


ONE_SIDED = logps_of([-1, -4, 0, -1], [0, 0, -2, -3]), logps_of([-2, -2, 0, -6], [0, 0, -5, -4])


def test_clean_and_flipped_apart():
    values = measured()
    assert values["clean/rewards/accuracies"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert values["flipped/rewards/accuracies"] == 0
    assert values["flipped/rewards/margins"] == pytest.approx(-2)


def test_against_the_truth():
    """Truth: chosen, rejected, rejected, unknown. Margins towards it: 2, -0, 4."""
    values = measured()
    assert values["true/rewards/margins"] == pytest.approx(0.5 * (2 + 0 + 4) / 3)
    assert values["true/rewards/accuracies"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_names_without_pairs_are_absent():
    metrics = PreferenceMetrics()
    batch = batch_of([False] * 4, [math.nan] * 4)
    metrics.update(DPO(), DPO()(POLICY, REFERENCE), POLICY, REFERENCE, batch)
    assert not [name for name in metrics.compute() if name.startswith(("flipped/", "true/"))]


def test_rewards_are_what_the_loss_compares():
    """SimPO's rewards are per-token means (lengths 2 and 4), as its formula's are."""
    uniform = logps_of([0] * 4, [0] * 4)
    metrics = PreferenceMetrics()
    loss = SimPO(2.0)
    metrics.update(loss, loss(POLICY, uniform), POLICY, uniform, BATCH)
    assert metrics.compute()["rewards/chosen"] == pytest.approx(2.0 * -14 / 2 / 4)


def test_accuracy_is_one_half_at_step_zero():
    metrics = PreferenceMetrics()
    metrics.update(DPO(), DPO()(POLICY, POLICY), POLICY, POLICY, BATCH)
    values = metrics.compute()
    assert values["rewards/accuracies"] == 0.5
    assert values["true/rewards/accuracies"] == 0.5
    assert values["rewards/ties"] == 1


def test_rounding_noise_is_a_tie():
    """Margins of 1e-5 nats between log-probabilities of 100 nats are rounding; 1e-2 is not."""
    reference = logps_of([-100, -100], [-120, -120])
    policy = logps_of([-100 + 1e-5, -100 + 1e-2], [-120, -120])
    assert zero_out_rounding((policy - reference).margin, policy, reference).tolist() == pytest.approx(
        [0.0, 1e-2], abs=1e-4
    )
    assert zero_out_rounding((policy - reference).margin, policy, reference)[0].item() == 0.0


def test_a_margin_per_token_of_long_responses_is_no_tie():
    """Half a nat over 500 tokens, of sums of 1,500 nats; rounding errors of the sums are ties here too."""
    length = torch.full((2,), 500)
    policy, reference = logps_of([-1500, -1500 + 1e-4], [-1500, -1500]), logps_of([-1500.5, -1500], [-1500, -1500])
    policy, reference = (replace(each, chosen_length=length, rejected_length=length) for each in (policy, reference))
    assert reward_margins(DPOMean(2.0), policy, reference).tolist() == pytest.approx([2.0 * 0.5 / 500, 0])


def uneven(rows: slice) -> PreferenceMetrics:
    metrics, loss = PreferenceMetrics(), DPO(0.3)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(7, 4, generator=generator)[rows]
    flipped = [False, True, False, True, True, False, False][rows]
    gold = [1.0, -1.0, 0.0, math.nan, 2.0, -3.0, 1.0][rows]
    if columns.shape[0]:
        policy, reference = logps_of(*columns.T[:2].tolist()), logps_of(*columns.T[2:].tolist())
        metrics.update(loss, loss(policy, reference), policy, reference, batch_of(flipped, gold))
    return metrics


def one_rank(rank: int, world_size: int) -> None:
    """Of 7 pairs rank 0 has 5, rank 1 has 2, rank 2 none."""
    bounds = [0, 5, 7, 7]
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    print(json.dumps(uneven(slice(bounds[rank], bounds[rank + 1])).compute()))
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_real_ranks_give_the_same_means():
    alone = uneven(slice(0, 7)).compute()
    for output in run_in_ranks("tests.core.test_metrics", "one_rank", 3):
        assert json.loads(output) == pytest.approx(alone, abs=1e-9)


def test_values_are_all_that_are_finite_whatever_the_parts():
    values = Values()
    for part in (torch.arange(3.0), torch.tensor([float("nan"), float("inf")]), torch.zeros(0), torch.tensor([-1e9])):
        values.update(part)
    assert values.compute().tolist() == [0.0, 1.0, 2.0, -1e9]
    values.reset()
    values.update(torch.tensor([float("nan")]))
    assert len(values.compute()) == 0


def values_rank(rank: int, world_size: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    uneven, of_one = Values(), Values()
    uneven.update(torch.arange(7.0)[rank::world_size] - 3)
    if rank == 0:  # the other ranks saw no batch
        of_one.update(torch.arange(2.0))
    print(sorted(uneven.compute().tolist()), of_one.compute().tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_every_rank_gets_the_values_of_all():
    said = f"{[float(value) for value in range(-3, 4)]} [0.0, 1.0]"
    assert [output.strip() for output in run_in_ranks("tests.core.test_metrics", "values_rank", 2)] == [said, said]
