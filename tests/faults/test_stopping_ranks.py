"""Faults 7, 10 and 14 of the matrix in two real ranks: a stop, a NaN in one of them, another number of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.data.datamodule import StepSampler
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.runs import metrics_log
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.nonfinite import NotFinite
from tests.support.ranks import become_rank, run_in_ranks
from tests.support.small_fit import IGNORED, PAIRS, cut, difference, left, run, saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]


class Raise(Callback):
    """A signal to rank 1 alone, within step N."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step - 1 and not self.validating and trainer.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_validation_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step and self.validating and trainer.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)


class NanInRankOne(DPOModule):
    """The gradient of one pair of rank 1's part of step 4 is NaN, its loss is not."""

    def part_loss(self, part):
        loss = super().part_loss(part)
        if self.global_step == 3 and self.trainer.global_rank == 1 and part.keys[0] == self.trainer.bad_key:
            loss = loss + torch.sqrt(0 * loss)
        return loss


class BadKey(Callback):
    """Choose rank 1's first pair of step 4 as the bad one."""

    def on_train_start(self, trainer, module) -> None:
        trainer.bad_key = None

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if trainer.global_step == 3:
            trainer.bad_key = batch.keys[0]


def rank(number: int, world_size: int, folder: str) -> None:
    """One of two ranks that stop, go on, and meet a NaN; what is left lies in the folder for the tests below."""
    become_rank(number, world_size)
    torch.set_num_threads(1)
    here = Path(folder)
    run(here / "whole", devices=world_size)
    statuses = []
    for at in (Raise(2), Raise(5), Raise(6, validating=True)):
        try:
            run(here / "cut", devices=world_size, callbacks=[at], workers=2)
        except StopSignal as stopped:
            statuses.append((stopped.status, saved(here / "cut")))
    run(here / "cut", devices=world_size)
    try:
        run(here / "two and one", devices=world_size, kind=DPOModule, callbacks=[Raise(3)])
    except StopSignal:
        statuses.append(("stopped", saved(here / "two and one")))
    run(here / "one and two", devices=world_size, kind=DPOModule)
    message = ""
    try:
        run(here / "nan", devices=world_size, kind=NanInRankOne, callbacks=[BadKey()])
    except NotFinite as error:
        message = str(error)
    print("RESULT", json.dumps([statuses, message]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two ranks left, and what each of them said."""
    folder = tmp_path_factory.mktemp("ranks")
    cut(folder / "one and two", 4, kind=DPOModule)
    outputs = run_in_ranks("tests.faults.test_stopping_ranks", "rank", 2, str(folder))
    return folder, [json.loads(output.split("RESULT", 1)[1]) for output in outputs]


def test_07_two_ranks_agree_to_stop_and_go_on_bit_identically(ranks):
    """SIGTERM to one of them, within a step and within a validation; with loader workers and then without."""
    folder, said = ranks
    assert said[0][0] == said[1][0]
    assert said[0][0] == [["preempted", [2]], ["preempted", [4, 5]], ["preempted", [5, 6]], ["stopped", [2, 3]]]
    assert difference(left(folder / "cut"), left(folder / "whole")) is None
    assert left(folder / "whole")["dpo_lab"]["world_size"] == 2


def test_10_two_ranks_stop_before_a_gradient_that_is_not_finite_in_one(ranks):
    folder, said = ranks
    sampler = StepSampler(PAIRS.sizes.tolist(), 4, 5, rank=1, world_size=2)
    key = PAIRS.key(sampler.step(3)[0])
    assert said[0][1] == said[1][1]
    assert f"step 4: the loss or its gradient is not finite (rank 1, pair {key})" in said[0][1]
    assert saved(folder / "nan") == [2]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in left(folder)["state_dict"].values()])


@pytest.mark.parametrize("changed", ["one and two", "two and one"])
def test_14_another_number_of_ranks_takes_the_same_steps(changed, ranks, tmp_path):
    folder, _ = ranks
    run(tmp_path, kind=DPOModule)
    run(folder / changed, kind=DPOModule)  # of "one and two" the ranks have finished
    assert (weights(folder / changed) - weights(tmp_path)).abs().max() < 1e-6
    rows, of_one = (list(metrics_log.rows(f / "metrics.jsonl")) for f in (folder / changed, tmp_path))
    assert len(rows) == len(of_one) == 5
    for row, expected in zip(rows, of_one, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
