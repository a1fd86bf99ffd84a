"""The policy that early stopping keeps: the best one or the last, in one process and in ranks, after a kill at any point;
and the time limit of a start.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from dpo_lab.distributed.signals import StopSignal, stopped_by
from dpo_lab.distributed.supervisor import EXIT_CODES
from dpo_lab.models.policy import TinyPolicy
from dpo_lab.models.sharded_weights import full_tensor
from dpo_lab.reporting.run_summary import cost_rows
from dpo_lab.runs.run_record import CHECKPOINTS, RunFailed
from dpo_lab.training.callbacks.early_stopping import EarlyStopping, keep_policy
from dpo_lab.training.callbacks.progress_bar import TimeLimit
from dpo_lab.training.checkpoint_io import CheckpointError
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from tests.support.ranks import become_rank, run_in_ranks
from tests.support.small_fit import IGNORED, TOKENIZER, Leave, LeaveAt, difference, left, run, saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]

VALUES = {3: 1.0, 6: 0.5, 9: 0.8, 12: 0.7}  # of val/scripted by step; at patience 2 the run stops at 12


class Script(Callback):
    """Writes down a metric of known values at the end of each validation."""

    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.callback_metrics["val/scripted"] = torch.tensor(VALUES[trainer.global_step])


def callbacks(*more: Callback, **settings) -> list[Callback]:
    return [*more, Script(), EarlyStopping(**({"monitor": "val/scripted", "patience": 2} | settings))]


def fresh():
    return TinyPolicy(hidden_size=8, layers=1, heads=2, intermediate_size=8).build(TOKENIZER, seed=0)


def weights_in(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = torch.load(folder / CHECKPOINTS / f"step={step}.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def kept_by(trainer: Trainer) -> tuple[dict, dict[str, torch.Tensor]]:
    """What is recorded, and the weights that are kept."""
    model = trainer.lightning_module.model
    return keep_policy(trainer, model)["early_stopping"], model.state_dict()  # type: ignore[union-attr,operator]


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> tuple[Path, dict, dict[str, torch.Tensor]]:
    """A fit that nothing interrupted: its folder, and what it keeps."""
    folder = tmp_path_factory.mktemp("best")
    return folder, *kept_by(run(folder, steps=20, callbacks=callbacks()))


def test_the_best_policy_is_kept_though_two_later_checkpoints_are_there(best):
    folder, record, weights = best
    assert record == {
        "policy": "best",
        "step": 6,
        "last_step": 12,
        "stopped_early": True,
        "monitor": "val/scripted",
        "best_step": 6,
        "best_value": 0.5,
    }
    assert saved(folder) == [6, 10, 12]
    assert difference(dict(weights), weights_in(folder, 6)) is None
    assert difference(dict(weights), weights_in(folder, 12)) is not None
    assert cost_rows({"early_stopping": record}) == [
        ("policy kept: the best of 12 steps", "step 6"),
        ("best val/scripted, at step 6", "0.500"),
    ]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_the_best_adapters_are_kept_and_their_base_is_left_alone(tmp_path):
    record, weights = kept_by(run(tmp_path, steps=20, callbacks=callbacks(), adapters=torch.float32))
    assert record["step"] == 6
    best = weights_in(tmp_path, 6)
    assert best.keys() == {name for name in weights if "lora_" in name}
    assert difference({name: weights[name] for name in best}, best) is None
    assert difference(dict(best), dict(weights_in(tmp_path, 12))) is not None
    base = fresh().state_dict()
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor for name, tensor in weights.items()
    }
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.items())


def test_the_last_policy_is_kept_where_the_config_says_so(tmp_path):
    record, weights = kept_by(run(tmp_path, steps=20, callbacks=callbacks(policy_to_keep="last")))
    assert (record["policy"], record["step"], record["best_step"]) == ("last", 12, 6)
    assert saved(tmp_path) == [10, 12]
    assert difference(dict(weights), weights_in(tmp_path, 12)) is None


@pytest.mark.parametrize(
    ("step", "validating"),
    [(5, False), (6, True), (6, False), (9, True), (12, True)],
)
def test_a_kill_between_the_best_and_the_stop_changes_nothing(step, validating, best, tmp_path):
    with pytest.raises(Leave):
        run(tmp_path, steps=20, callbacks=callbacks(LeaveAt(step, validating)))
    for _ in range(2):  # the second time training is over already, as after a kill in the evaluation
        record, weights = kept_by(run(tmp_path, steps=20, callbacks=callbacks()))
        assert record == best[1]
        assert difference(dict(weights), dict(best[2])) is None
        assert difference(left(tmp_path), left(best[0])) is None
        assert saved(tmp_path) == saved(best[0])


def test_a_run_that_ends_at_its_last_step_keeps_its_best_too(tmp_path):
    record, weights = kept_by(run(tmp_path, steps=9, callbacks=callbacks()))
    assert (record["step"], record["last_step"], record["stopped_early"]) == (6, 9, False)
    assert difference(dict(weights), weights_in(tmp_path, 6)) is None


def test_a_validation_that_was_owed_at_the_end_may_be_the_best(tmp_path):
    """It is made up for after the fit, where Lightning's own early stopping doesn't look."""
    with pytest.raises(Leave):
        run(tmp_path, steps=6, callbacks=callbacks(LeaveAt(6, validating=True)))
    record, _ = kept_by(run(tmp_path, steps=6, callbacks=callbacks()))
    assert (record["best_step"], record["best_value"]) == (6, 0.5)


def test_settings_of_early_stopping_without_effect_are_refused(best, tmp_path):
    with pytest.raises(RunFailed, match=r"callbacks.early_stopping.monitor=val/los: .*one of .*val/loss"):
        run(tmp_path, callbacks=[EarlyStopping("val/los")])
    with pytest.raises(ValueError, match=r"callbacks.early_stopping.policy_to_keep=first: must be best or last"):
        EarlyStopping("val/loss", "first")
    trainer = run(best[0], steps=20, callbacks=callbacks())
    (best[0] / CHECKPOINTS / "step=6.ckpt").rename(tmp_path / "step=6.ckpt")
    with pytest.raises(
        CheckpointError, match=r"step=6.ckpt: the checkpoint of the best policy is missing; put it back"
    ):
        kept_by(trainer)
    (tmp_path / "step=6.ckpt").rename(best[0] / CHECKPOINTS / "step=6.ckpt")


STRATEGIES = {"ddp": "ddp", "fsdp": FSDP2Strategy()}


def rank(number: int, world_size: int, folder: str) -> None:
    """Train by both strategies in turn, and keep the best."""
    become_rank(number, world_size)
    for name, strategy in STRATEGIES.items():
        place = Path(folder) / name
        settings = dict(devices=world_size, strategy=strategy, kind=DPOModule)
        trainer = run(place, steps=20, callbacks=callbacks(), **settings)
        model = trainer.lightning_module.model
        record = keep_policy(trainer, model)["early_stopping"]
        weights = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
        torch.save({"record": record, "weights": weights}, place / f"rank-{number}.pt")


def test_ranks_keep_the_best_policy_alike(tmp_path):
    run_in_ranks("tests.training.test_early_stopping", "rank", 2, str(tmp_path))
    for name in STRATEGIES:
        first, second = (torch.load(tmp_path / name / f"rank-{n}.pt", weights_only=True) for n in range(2))
        assert saved(tmp_path / name) == [6, 10, 12]
        assert difference(first, second) is None
        assert first["record"]["step"] == 6
        assert difference(dict(first["weights"]), weights_in(tmp_path / name, 6)) is None


class Clock:
    """Time that passes by a second a step."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def test_a_time_limit_stops_a_start_and_the_next_one_has_all_of_it_again(whole, tmp_path, monkeypatch, caplog):
    for last in (2, 4, 6):
        monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock())
        with pytest.raises(StopSignal, match=r"^trainer.max_time$") as stopped:
            run(tmp_path, callbacks=[TimeLimit("00:00:00:02")])
        assert (stopped.value.status, stopped.value.exit_code) == ("stopped", 142)
        assert saved(tmp_path)[-1] == last
    run(tmp_path, callbacks=[TimeLimit("00:00:00:02")])
    assert "trainer.max_time=00:00:00:02 is over: stopping at step 2 of 7; type the same command again" in caplog.text
    assert difference(left(tmp_path), left(whole)) is None


def test_a_supervisor_and_a_sweep_know_the_exit_code_of_a_time_limit():
    stopped = stopped_by(142)
    assert stopped is not None
    assert (stopped.status, 142 in EXIT_CODES) == ("stopped", True)


@pytest.mark.parametrize("limit", ["2", "12:00:00", 7, {"fortnights": 1}])
def test_a_time_limit_that_can_t_be_read_is_refused(limit):
    with pytest.raises(
        MisconfigurationException, match=r"trainer.max_time=.*must be days:hours:minutes:seconds; type e.g."
    ):
        TimeLimit(limit)
