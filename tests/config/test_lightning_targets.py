"""Lightning's own classes that a config may name: each is made and, where it has a part in training, trains."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from dpo_lab.config import lightning_targets
from dpo_lab.config.allowed_targets import ALLOWED, TargetRefused, check_targets, instantiate_checked
from dpo_lab.config.lightning_targets import EXCEPTIONS, PACKAGE
from tests.support.configs import settled
from tests.support.small_fit import IGNORED, Leave, LeaveAt, difference, left, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]

KINDS = {"callbacks": Callback, "loggers": Logger, "profilers": Profiler, "strategies": Strategy}
# What each is made with; plain values, as a config gives them.
SETTINGS = {
    "callbacks": {
        "DeviceStatsMonitor": {"cpu_stats": False},
        "EarlyStopping": {"monitor": "val/loss", "patience": 9},
        "LearningRateMonitor": {"logging_interval": "step"},
        "ModelCheckpoint": {"monitor": "val/loss", "filename": "best"},
        "ModelSummary": {"max_depth": 2},
        "RichModelSummary": {"max_depth": 2},
        "RichProgressBar": {"refresh_rate": 5},
        "TQDMProgressBar": {"refresh_rate": 5},
    },
    "loggers": {
        "CSVLogger": {"save_dir": "x"},
        "MLFlowLogger": {"experiment_name": "x", "tracking_uri": "file:x"},
        "TensorBoardLogger": {"save_dir": "x"},
        "WandbLogger": {"offline": True},
    },
    "profilers": {
        "AdvancedProfiler": {"line_count_restriction": 0.5},
        "PassThroughProfiler": {},
        "PyTorchProfiler": {"emit_nvtx": False, "sort_by_key": "cpu_time_total"},
        "SimpleProfiler": {"extended": False},
    },
    "strategies": {"DDPStrategy": {"find_unused_parameters": False}, "SingleDeviceStrategy": {"device": "cpu"}},
}
EACH = [(module, name) for module, classes in SETTINGS.items() for name in classes]
PACKAGES = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}  # of extras that may not be installed
BARS = ("RichProgressBar", "TQDMProgressBar")


def test_every_class_that_lightning_exports_is_allowed_or_refused_with_a_reason():
    for module, kind in KINDS.items():
        exported = importlib.import_module(f"{PACKAGE}.{module}")
        allowed, refused = {*lightning_targets.ALLOWED[module]}, EXCEPTIONS[module]
        assert not allowed & refused.keys()
        assert {*exported.__all__} <= allowed | refused.keys()
        assert all(issubclass(getattr(exported, name), kind) for name in allowed)
        assert all(hasattr(exported, name) for name in refused)
        assert {*SETTINGS[module]} == allowed
        assert all(f"{PACKAGE}.{module}.{name}" in ALLOWED for name in allowed)


def make(module: str, name: str):
    return instantiate_checked({"_target_": f"{PACKAGE}.{module}.{name}", **SETTINGS[module][name]}, KINDS[module])


@pytest.mark.parametrize(("module", "name"), EACH)
def test_each_that_is_allowed_is_made_from_plain_values(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    assert type(make(module, name)).__name__ == name


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in EXCEPTIONS.items() for n in names])
def test_each_other_is_refused_with_its_reason(module, name):
    target = f"{PACKAGE}.{module}.{name}"
    with pytest.raises(TargetRefused) as refused:
        check_targets({"x": {"_target_": target}})
    assert str(refused.value) == f"_target_={target}: {EXCEPTIONS[module][name]}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(module, name, marks=[] if module == "callbacks" else [pytest.mark.extended])
        for module, name in EACH
        if module != "loggers" and name != "DDPStrategy"
    ],
)
def test_each_leaves_what_a_fit_learns_as_it_is_and_a_resumed_one_too(module, name, whole, tmp_path):
    def fit(folder: Path, *more: Callback) -> dict:
        key = {"callbacks": None, "profilers": "profiler", "strategies": "strategy"}[module]
        made = make(module, name)
        settings = {"callbacks": [made, *more]} if key is None else {"callbacks": more, key: made}
        if name in BARS:
            settings["enable_progress_bar"] = True
        if name == "SingleDeviceStrategy":
            settings["accelerator"] = "auto"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            run(folder, **settings)
        return left(folder)

    found, plain = fit(tmp_path / "whole"), left(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert difference(found[key], plain[key]) is None
    if name == "PyTorchProfiler":  # torch has one a process, and that of a fit that crashed would end in the next one
        return
    with pytest.raises(Leave):
        fit(tmp_path / "cut", LeaveAt(3))
    resumed = fit(tmp_path / "cut")
    for each in (found, resumed):
        if name == "ModelCheckpoint":  # its state holds paths
            each.pop("callbacks")
    assert difference(resumed, found) is None


def test_configs_name_them_as_the_documents_say():
    devices, profiler = f"{PACKAGE}.callbacks.DeviceStatsMonitor", f"{PACKAGE}.profilers.SimpleProfiler"
    settings = settled(f"+callbacks.devices._target_={devices}", f"+trainer.profiler._target_={profiler}")
    assert settings.callbacks["devices"] == {"_target_": devices}
    assert settings.trainer["profiler"] == {"_target_": profiler}
    with pytest.raises(Exception, match="replaces the schedule of the learning rate"):
        settled(f"+callbacks.swa._target_={PACKAGE}.callbacks.StochasticWeightAveraging")
