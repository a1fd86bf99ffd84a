"""The loggers of a run: its metrics log, those that the config asks for, and TensorBoard's HPARAMS."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dpo_lab.config.allowed_targets import instantiate_checked
from dpo_lab.config.schema import ConfigError
from dpo_lab.stats.estimates import Estimate
from dpo_lab.training.loggers import tensorboard_hparams
from dpo_lab.training.loggers.jsonl import JSONLLogger
from dpo_lab.training.loggers.tensorboard import FINAL_METRICS, show_charts, show_figures, show_samples

log = logging.getLogger("dpo_lab")

MLFLOW_STORE = "sqlite:///outputs/mlflow.db"  # without a server
TENSORBOARD, WANDB, MLFLOW = (f"lightning.pytorch.loggers.{k}Logger" for k in ("TensorBoard", "Wandb", "MLFlow"))


@contextmanager
def track_run_status(trainer: Trainer, config_dict: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Write a row of TensorBoard's HPARAMS, at the end with its status; tell other loggers of a failure.

    A run that is asked to stop keeps its row without a status, since it is resumed later. Only rank 0 enters it.
    """
    in_tensorboard = any(node["_target_"] == TENSORBOARD for node in config_dict["logger"].values())
    if in_tensorboard:
        tensorboard_hparams.start(folder, tensorboard_hparams.columns(config_dict))
    try:
        yield
    except Exception:
        tensorboard_hparams.end(folder, succeeded=False)
        for logger in trainer.loggers:
            try:
                logger.finalize("failed")
            except Exception as error:  # the run's own error is the one to report
                log.warning("%s could not record that the run failed: %s", type(logger).__name__, error)
        raise
    if in_tensorboard:
        tensorboard_hparams.end(folder, succeeded=True)


def add_loggers(
    trainer: Trainer,
    config_dict: Mapping[str, Any],
    folder: Path,
    step: int,
    *,
    started: str = "",
    charts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Open the metrics log and the configured loggers, and hand them to the trainer before it trains.

    step: the step that the run resumes from; TensorBoard drops what an earlier attempt logged after it. started: the
    time of the run's first attempt. charts: scalars to draw in one chart, see show_charts. Raises ConfigError if a
    logger can't be created.
    """
    loggers: list[Logger] = [JSONLLogger(folder)]
    for key, node in config_dict["logger"].items():
        try:
            logger = instantiate_checked(node, Logger, **_run_arguments(node, folder, step, started))
            if trainer.is_global_zero and not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(tensorboard_hparams.columns(config_dict))
        except Exception as error:  # each library raises its own
            other = f"logger.{key}.offline=true" if node["_target_"] == WANDB else "logger=tensorboard"
            raise ConfigError(f"logger.{key}: can't be created: {last_line(error)}; type e.g. {other}") from error
        loggers.append(logger)
    trainer.loggers = loggers
    show_charts(trainer, charts or {})


def _run_arguments(node: Mapping[str, Any], folder: Path, step: int, started: str) -> dict[str, Any]:
    """Return the arguments of a logger that depend on the run: its folder, its name and a stable id."""
    name = "/".join(folder.parts[-3:])
    save_dir = {} if "save_dir" in node else {"save_dir": folder}
    if node["_target_"] == TENSORBOARD:
        return save_dir | {"purge_step": step}
    if node["_target_"] == WANDB:
        text = f"{folder.absolute()} {started}"  # the same for all attempts of a run
        return save_dir | {"name": name, "id": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}
    if node["_target_"] == MLFLOW:
        server = os.environ.get("MLFLOW_TRACKING_URI")  # never recorded: it may hold a password
        store = {} if "tracking_uri" in node else {"tracking_uri": server or MLFLOW_STORE}
        return save_dir | store | {"run_name": name, "tags": {"started": started}}
    return save_dir


def log_final_metrics(
    trainer: Trainer,
    metrics: Mapping[str, Estimate],
    samples: Sequence[Mapping[str, str]] = (),
    figures: Sequence[Path] = (),
) -> None:
    """Log the final metrics under eval/ to every logger, to TensorBoard under FINAL_METRICS, and to it also a table of
    samples and PNG figures.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        group = FINAL_METRICS if isinstance(logger, TensorBoardLogger) else "eval"
        logger.log_metrics({f"{group}/{name}": e.value for name, e in metrics.items()}, step=step)
    show_samples(trainer.loggers, samples, step)
    show_figures(trainer.loggers, figures, step)
    for logger in trainer.loggers:
        logger.save()
        logger.finalize("success")


def last_line(error: Exception) -> str:
    """Return the last line of a library's error message, of Hydra's errors that of their cause."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
