"""What TensorBoard is told: each run's row and its true end, margin histograms, samples and figures, each step once."""

from __future__ import annotations

import struct
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.summary.writer import event_file_writer

from dpo_lab.core.metrics import Values
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.pipelines.loggers import TENSORBOARD, log_final_metrics, track_run_status
from dpo_lab.stats.estimates import Estimate
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.loggers import tensorboard_hparams
from dpo_lab.training.loggers.tensorboard import show_figures, show_histogram, show_samples
from tests.conftest import SMALL, make_pairs
from tests.support.small_fit import IGNORED, Leave, LeaveAt, run
from tests.support.warm import run_module

PLAIN = {
    "beta": 0.1,
    "seed": 3,
    "name": "sweep",
    "loss": {"kind": "dpo", "beta": 0.1},  # repeats beta
    "noise": {"seed": 4},  # is of its own
    "reference": {"kind": "lora", "merge": True},
    "optim": {"clip": None, "betas": [0.9, 0.99]},
    "data": {"path": "p.jsonl", "num_workers": 4, "hub_token": "hf_sesame"},
    "trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": 6, "precision": "32-true"},
    "logger": {"tensorboard": {"_target_": TENSORBOARD}},
    "callbacks": {"progress": {"_target_": "x"}, "early_stopping": {"_target_": "y", "patience": 3}},
}


def content(folder, tag: str) -> Any:
    """What TensorBoard believes of a folder's run under a tag of HPARAMS; None without one."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found = events.summary_metadata.get(tag)
    return found and found.plugin_data.content


def status(folder) -> str | None:
    found = content(folder, metadata.SESSION_END_INFO_TAG)
    return found and api_pb2.Status.Name(metadata.parse_session_end_info_plugin_data(found).status)


def goes(folder, ending: BaseException | None = None, loggers: list | None = None) -> None:
    trainer: Any = SimpleNamespace(loggers=loggers or [])
    try:
        with track_run_status(trainer, PLAIN, folder):
            if ending is not None:
                raise ending
    except type(ending or Leave()):
        assert ending is not None


def test_a_row_holds_what_runs_are_compared_by_in_its_own_type(tmp_path):
    goes(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(content(tmp_path, metadata.SESSION_START_INFO_TAG))
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()} == {
        "beta": 0.1,
        "seed": 3.0,
        "loss.kind": "dpo",
        "noise.seed": 4.0,
        "reference.kind": "lora",
        "reference.merge": True,
        "optim.betas": "[0.9, 0.99]",
        "data.path": "p.jsonl",
        "data.hub_token": "<redacted>",
        "trainer.max_steps": 6.0,
        "trainer.precision": "32-true",
        "callbacks.early_stopping.patience": 3.0,
    }
    assert start.hparams["reference.merge"].WhichOneof("kind") == "bool_value"
    assert all(b"sesame" not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (None, "STATUS_SUCCESS"),
        (ValueError("boom"), "STATUS_FAILURE"),
        (StopSignal(15), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_row_says_how_the_run_ended(ending, expected, tmp_path):
    goes(tmp_path, ending)
    assert status(tmp_path) == expected


@pytest.mark.parametrize("first", [ValueError("boom"), StopSignal(15)])
def test_a_run_that_went_on_and_was_finished_is_a_success(first, tmp_path):
    goes(tmp_path, first)
    goes(tmp_path)
    assert status(tmp_path) == "STATUS_SUCCESS"


def test_a_run_that_died_can_be_recorded_as_failed(tmp_path):
    tensorboard_hparams.end(tmp_path, succeeded=False)
    assert list(tmp_path.iterdir()) == []  # it had not begun
    goes(tmp_path, StopSignal(15))
    tensorboard_hparams.end(tmp_path, succeeded=False)
    assert status(tmp_path) == "STATUS_FAILURE"


def test_a_logger_that_fails_with_the_run_does_not_hide_why(tmp_path, caplog):
    class Broken:
        def finalize(self, status: str) -> None:
            raise OSError("no network")

    with pytest.raises(ValueError, match="boom"):
        trainer: Any = SimpleNamespace(loggers=[Broken()])
        with track_run_status(trainer, PLAIN, tmp_path):
            raise ValueError("boom")
    assert "Broken could not record that the run failed: no network" in caplog.text


@pytest.mark.slow
def test_a_run_that_fails_while_it_is_prepared_is_a_failure(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\n')
    result = run_module("dpo_lab.train", *SMALL, "data=jsonl", "data.path=bad.jsonl", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "bad.jsonl:1" in result.stderr
    assert status(tmp_path / "run") == "STATUS_FAILURE"


def test_metrics_measured_once_come_first_among_those_of_hparams(logger, tmp_path):
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=6)
    logger.log_metrics({"train/loss": 0.7, "val/rewards/margins": 1.0}, step=6)
    log_final_metrics(trainer, {"kl": Estimate(1.5), "accuracy": Estimate(0.5)})
    events = EventAccumulator(str(tmp_path)).Reload()
    # TensorBoard sorts the metrics of that table as Python does; its cards otherwise, see test_tensorboard_browser
    assert sorted(events.Tags()["scalars"]) == [
        "train-end/accuracy",
        "train-end/kl",
        "train/loss",
        "val/rewards/margins",
    ]
    assert [(event.step, event.value) for event in events.Scalars("train-end/kl")] == [(6, 1.5)]


@pytest.fixture
def logger(tmp_path):
    return TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)


def test_a_histogram_is_drawn_from_its_range_alone(logger, tmp_path):
    margins = Values()
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True)
    margins.update(torch.tensor([float("nan")]))
    show_histogram(trainer, "val/margins", margins.compute(), 1)  # nothing was counted
    margins.update(torch.tensor([-0.5, 0.25, 0.25]))
    show_histogram(trainer, "val/margins", margins.compute(), 2)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (drawn,) = events.Histograms("val/margins")
    value = drawn.histogram_value
    assert (drawn.step, value.num, value.min, value.max) == (2, 3, -0.5, 0.25)
    assert sum(value.bucket) == 3
    assert min(value.bucket_limit) >= -0.5
    assert 0.25 <= max(value.bucket_limit) < 0.28


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_samples_stand_side_by_side_and_figures_as_they_are(logger, tmp_path):
    (tmp_path / "curves.png").write_bytes(png(5, 3))
    samples = [{"prompt": f"p{i}", "initial": "a | b", "trained": "c"} for i in range(20)]
    show_samples([logger], samples, 6)
    show_samples([logger], [], 7)
    show_samples([logger], [{**samples[0], "third": "d"}], 8)
    show_figures([logger], [tmp_path / "curves.png"], 6)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    text, with_third = events.Tensors("samples/text_summary")
    assert b"| prompt | initial policy | trained policy | third policy |" in with_third.tensor_proto.string_val[0]
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert (text.step, len(lines)) == (6, 2 + 16)
    assert lines[0] == "| prompt | initial policy | trained policy |"
    (image,) = events.Images("figures/curves")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (6, 5, 3, png(5, 3))


@pytest.mark.filterwarnings(*IGNORED)
def test_margin_histograms_stand_once_a_step_after_starts_that_were_cut_short(tmp_path, monkeypatch):
    # files of one second and one process, which starts never share, are read in the order of a number without leading zeros
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))

    def loggers(step: int):
        return [TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False, purge_step=step)]

    for at in (LeaveAt(3), LeaveAt(5), LeaveAt(6, validating=True)):
        with pytest.raises(Leave):
            run(tmp_path, loggers=loggers, callbacks=[at])
    run(tmp_path, loggers=loggers)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    drawn = events.Histograms("val/margins")
    assert [event.step for event in drawn] == [3, 6]
    assert [event.histogram_value.num for event in drawn] == [70, 70]
    means = [event.histogram_value.sum / event.histogram_value.num for event in drawn]
    assert means == pytest.approx([event.value for event in events.Scalars("val/rewards/margins")], abs=1e-6)


def test_charts_hold_scalars_that_are_logged():
    from dpo_lab.core.losses import DPO
    from dpo_lab.core.metrics import PreferenceMetrics
    from dpo_lab.core.pairs import PairLogps
    from dpo_lab.data.collate import collate

    metrics, batch = PreferenceMetrics(), collate(make_pairs(8))
    batch.flipped[::2] = True
    logps = PairLogps(*torch.zeros(2, 8), *torch.ones(2, 8))
    metrics.update(DPO(0.1), torch.zeros(8), logps, logps, batch)
    logged = {f"{split}/{name}" for split in ("train", "val") for name in metrics.compute()}
    assert {name for names in DPOModule.charts.values() for name in names} <= logged
    assert DPOModule.charts["rewards/held out: chosen and rejected"] == ("val/rewards/chosen", "val/rewards/rejected")
