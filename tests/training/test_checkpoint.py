"""Checkpoints: one file that verifies itself, and a run that goes on from it as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from dpo_lab.runs import metrics_log
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training.callbacks.checkpointing import Checkpointing
from dpo_lab.training.checkpoint_io import CheckpointError, VerifiedCheckpointIO, by_step, damage, newest
from dpo_lab.training.optim import Decay, Optim
from dpo_lab.training.sft_module import SFTModule
from tests.support.small_fit import IGNORED, STEPS, Leave, LeaveAt, cut, difference, left, run, saved

pytestmark = pytest.mark.filterwarnings(*IGNORED)


def test_a_file_is_read_by_plain_torch_mapped_or_not_and_holds_no_reference(whole):
    path = newest(whole / CHECKPOINTS)
    assert path is not None
    assert saved(whole) == [6, 7]
    for mapped in (False, True):
        assert torch.load(path, weights_only=True, mmap=mapped)["global_step"] == STEPS
    found = VerifiedCheckpointIO().load_checkpoint(path)
    assert difference(found, torch.load(path, weights_only=True)) is None
    assert all(name.startswith("model.") for name in found["state_dict"])
    assert found["dpo_lab"]["world_size"] == 1
    assert len(found["dpo_lab"]["ranks"]) == 1


@pytest.mark.parametrize("step", range(1, STEPS))
def test_going_on_from_any_step_is_bit_identical(step, whole, tmp_path):
    """Before the first checkpoint, within an epoch, at its border, past it; between two log points; a validation owed."""
    cut(tmp_path, step)
    assert saved(tmp_path) == [at for at in (2, 4, 6) if at <= step][-2:]
    run(tmp_path)
    assert difference(left(tmp_path), left(whole)) is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_adapters_holds_what_trains_and_going_on_is_bit_identical(dtype, tmp_path):
    """From the checkpoint of an earlier version as well, which held the base too."""
    trainer = run(tmp_path / "whole", adapters=dtype)
    trained = {name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    assert left(tmp_path / "whole")["state_dict"].keys() == trained
    assert all("lora_" in name for name in trained)
    for earlier in (False, True):
        folder = tmp_path / f"cut-{earlier}"
        cut(folder, 5, adapters=dtype)
        if earlier:
            path = folder / CHECKPOINTS / "step=4.ckpt"
            found = VerifiedCheckpointIO().load_checkpoint(path)
            found["state_dict"] |= {
                name: p for name, p in trainer.lightning_module.named_parameters() if name not in trained
            }
            VerifiedCheckpointIO().save_checkpoint(found, path)
        run(folder, adapters=dtype)
        assert difference(left(folder), left(tmp_path / "whole")) is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_checkpoint_of_other_adapters_is_not_loaded(change, tmp_path):
    cut(tmp_path, 5, adapters=torch.float32)
    path = tmp_path / CHECKPOINTS / "step=4.ckpt"
    found = VerifiedCheckpointIO().load_checkpoint(path)
    weight = found["state_dict"].popitem()[1]
    if change == "unexpected":
        found["state_dict"]["model.other"] = weight
    VerifiedCheckpointIO().save_checkpoint(found, path)
    with pytest.raises(RuntimeError, match="Missing key.*lora_"):
        run(tmp_path, adapters=torch.float32)


def test_supervised_fine_tuning_goes_on_too_and_goes_on_counting_tokens(tmp_path):
    run(tmp_path / "whole", kind=SFTModule)
    cut(tmp_path / "cut", 5, kind=SFTModule)
    run(tmp_path / "cut", kind=SFTModule)
    assert difference(left(tmp_path / "cut"), left(tmp_path / "whole")) is None
    counted = [
        row["train/tokens"] for row in metrics_log.rows(tmp_path / "cut" / "metrics.jsonl") if "train/tokens" in row
    ]
    assert counted == sorted(set(counted))
    assert left(tmp_path / "cut")["tokens"] > counted[-1] > 0  # the checkpoint is a step further


def test_what_a_fit_logs_counts_the_steps_that_are_done(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "train/loss" in row) for row in rows] == [
        (2, True),
        (3, False),
        (4, True),
        (6, True),
        (6, False),
    ]
    assert all(("val/loss" in row) is ("train/loss" not in row) for row in rows)


@pytest.mark.parametrize("steps", [6, 7])
def test_a_validation_that_a_crash_cut_short_is_made_up_for(steps, tmp_path):
    """After the last step as well, when there is nothing left to train."""
    run(tmp_path / "whole", steps=steps)
    with pytest.raises(Leave):
        run(tmp_path / "cut", steps=steps, callbacks=[LeaveAt(6, validating=True)])
    for _ in range(2):  # the second time nothing at all is left to do
        run(tmp_path / "cut", steps=steps)
        assert difference(left(tmp_path / "cut"), left(tmp_path / "whole")) is None


def test_max_steps_may_grow(whole, tmp_path):
    def longer(folder: Path, *steps: int, decay: Decay) -> dict:
        for count in steps:
            run(folder, steps=count, optim=Optim(lr=1e-2, warmup_steps=2, decay=decay))
        return left(folder)

    grown = longer(tmp_path / "grown", 5, 7, decay=Decay.constant)
    assert difference(grown, longer(tmp_path / "at once", 7, decay=Decay.constant)) is None
    halved = longer(tmp_path / "linear", 3, 6, decay=Decay.linear)
    assert halved["global_step"] == 6
    assert halved["lr_schedulers"][0]["last_epoch"] == 6
    assert halved["optimizer_states"][0]["param_groups"][0]["lr"] == 0  # the decay of six steps, at its end


def test_early_stopping_leaves_a_checkpoint_of_its_last_step_and_stays_stopped(tmp_path):
    def stop_early() -> Callback:
        return EarlyStopping("val/loss", patience=1, min_delta=10.0)  # the second validation, after step 6

    for _ in range(2):
        trainer = run(tmp_path, steps=20, every_n_steps=5, callbacks=[stop_early()])
        assert trainer.global_step == 6
        assert saved(tmp_path) == [5, 6]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]


def test_what_was_damaged_and_passed_over_goes_when_a_newer_one_is_there(tmp_path, caplog):
    run(tmp_path, steps=4)
    (tmp_path / CHECKPOINTS / "step=4.ckpt").write_bytes(b"torn")
    cut(tmp_path, 3, every_n_steps=3)
    assert "step=4.ckpt: damaged" in caplog.text
    assert saved(tmp_path) == [2, 3]


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_a_csv_logger_is_told_again_what_it_forgets(tmp_path):
    def csv(folder: Path):
        return lambda step: [CSVLogger(folder, name="", version="")]

    run(tmp_path / "whole", loggers=csv(tmp_path / "whole"))
    cut(tmp_path / "cut", 5, loggers=csv(tmp_path / "cut"))
    run(tmp_path / "cut", loggers=csv(tmp_path / "cut"))
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"save_total_limit": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=rf"callbacks.checkpoint.{next(iter(settings))}=\d: must be"):
        Checkpointing(**settings)


class Payload:
    """What a hostile checkpoint does when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickled_payload_under_a_right_checksum_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step=1.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"state_dict": {}, "evil": Payload()}, path)
    assert damage(path) is None
    with pytest.raises(CheckpointError, match=r"step=1.ckpt: holds more than plain values and is not read"):
        VerifiedCheckpointIO().load_checkpoint(path)
    assert not Path("executed").exists()


def test_only_steps_are_checkpoints_of_a_run(tmp_path):
    assert newest(tmp_path / "none") is None
    for name in ("epoch=0-step=3.ckpt", "step=x.ckpt", "step=4.ckpt.bak", ".step=5.ckpt.1.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "step=6.ckpt").mkdir()
    assert newest(tmp_path) is None
    for step in (10, 9):
        VerifiedCheckpointIO().save_checkpoint({"step": step}, tmp_path / f"step={step}.ckpt")
    assert list(by_step(tmp_path)) == [9, 10]
    assert newest(tmp_path) == tmp_path / "step=10.ckpt"
    VerifiedCheckpointIO().remove_checkpoint(tmp_path / "step=10.ckpt")
    assert newest(tmp_path) == tmp_path / "step=9.ckpt"
