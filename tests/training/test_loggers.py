"""Lightning's other loggers: refused without their package, and offline they hold what the journal holds, no secret in it."""

from __future__ import annotations

import csv
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from dpo_lab.config import logger_packages, schema
from dpo_lab.config.schema import ConfigError
from dpo_lab.pipelines.loggers import MLFLOW, WANDB, add_loggers, log_final_metrics
from dpo_lab.runs import metrics_log
from dpo_lab.stats.estimates import Estimate
from tests.conftest import REPOSITORY
from tests.support.configs import composed

SECRET = "sesame-8d2f"
PLAIN = {"beta": 0.1, "data": {"hub_token": SECRET}, "loss": {"kind": "dpo"}}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_is_refused_by_the_command(name, monkeypatch):
    monkeypatch.setattr(logger_packages, "find_spec", lambda module: None)
    schema.validate(composed())
    with pytest.raises(ConfigError, match=rf"logger={name}: .* type pip install 'dpo_lab\[{name}\]'"):
        schema.validate(composed(f"logger={name}"))


def log(folder: Path, plain: dict[str, Any]) -> Trainer:
    """What a run tells its loggers."""
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    folder.mkdir(parents=True)
    add_loggers(trainer, PLAIN | plain, folder, 0, started="now")
    for logger in trainer.loggers:
        logger.log_metrics({"train/loss": 0.5}, step=2)
    log_final_metrics(trainer, {"kl": Estimate(1.5)})
    return trainer


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_csv(tmp_path):
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "", "version": ""}
    log(tmp_path / "run", {"logger": {"csv": node}})
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [(row["step"], row["train/loss"], row["eval/kl"]) for row in rows] == [("2", "0.5", ""), ("0", "", "1.5")]
    assert "beta: 0.1" in (tmp_path / "run" / "hparams.yaml").read_text()
    assert SECRET.encode() not in files(tmp_path)


def test_mlflow_without_a_server(tmp_path, monkeypatch):
    for module in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(module, reason="needs pip install 'dpo_lab[mlflow]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log(Path("outputs/dpo/beta=1/seed=0"), {"logger": {"mlflow": {"_target_": MLFLOW, "experiment_name": "dpo"}}})
    with sqlite3.connect("outputs/mlflow.db") as store:
        assert store.execute("select name, status from runs").fetchall() == [("dpo/beta=1/seed=0", "FINISHED")]
        assert ("train/loss", 0.5, 2) in store.execute("select key, value, step from metrics").fetchall()
        assert {("beta", "0.1"), ("data.hub_token", "<redacted>")} <= set(
            store.execute("select key, value from params").fetchall()
        )
    store.close()
    assert SECRET.encode() not in files(tmp_path)


def wandb_process(folder: str) -> None:
    """Log to wandb as a run's process does, whose end makes it write all it has."""
    trainer = log(Path(folder), {"logger": {"wandb": {"_target_": WANDB, "project": "dpo_lab", "offline": True}}})
    told = trainer.loggers[1].experiment
    assert (told.name, told.offline, dict(told.config)["beta"]) == ("dpo/beta=1/seed=0", True, 0.1)
    assert (told.summary["train/loss"], told.summary["eval/kl"]) == (0.5, 1.5)


def test_wandb_without_a_network(tmp_path):
    pytest.importorskip("wandb", reason="needs pip install 'dpo_lab[wandb]'")
    folder = tmp_path / "dpo" / "beta=1" / "seed=0"
    code = f"from tests.training.test_loggers import wandb_process; wandb_process({str(folder)!r})"
    environment = os.environ | {"WANDB_SILENT": "true"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (kept,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in kept.read_bytes()
    assert b"<redacted>" in kept.read_bytes()
    assert SECRET.encode() not in files(folder)
    assert [row["step"] for row in metrics_log.rows(folder / metrics_log.METRICS_LOG)] == [2, 0]


def test_a_logger_that_cannot_be_opened_is_refused_before_training(tmp_path):
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "", "version": "", "colour": "red"}
    with pytest.raises(ConfigError, match=r"logger.csv: can't be created: .*colour.*; type e.g. logger=tensorboard"):
        log(tmp_path / "run", {"logger": {"csv": node}})
