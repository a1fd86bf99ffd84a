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
from dpo_lab.training.loggers.tensorboard import show_charts, show_figures, show_samples

log = logging.getLogger("dpo_lab")

MLFLOW_STORE = "sqlite:///outputs/mlflow.db"  # without a server
TENSORBOARD, WANDB, MLFLOW = (f"lightning.pytorch.loggers.{k}Logger" for k in ("TensorBoard", "Wandb", "MLFlow"))


@contextmanager
def track_run_status(trainer: Trainer, plain: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """A row in HPARAMS from now on, which says in the end that the run succeeded or failed; other loggers hear of a failure.

    One that is asked to stop has done neither: it goes on later. For rank 0, from before anything can fail.
    """
    in_tensorboard = any(node["_target_"] == TENSORBOARD for node in plain["logger"].values())
    if in_tensorboard:
        tensorboard_hparams.start(folder, tensorboard_hparams.columns(plain))
    try:
        yield
    except Exception:
        tensorboard_hparams.end(folder, succeeded=False)
        for logger in trainer.loggers:
            try:
                logger.finalize("failed")
            except Exception as error:  # what the run failed of is what matters
                log.warning("%s could not be told that the run failed: %s", type(logger).__name__, error)
        raise
    if in_tensorboard:
        tensorboard_hparams.end(folder, succeeded=True)


def add_loggers(
    trainer: Trainer,
    plain: Mapping[str, Any],
    folder: Path,
    step: int,
    *,
    started: str = "",
    charts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The run's journal and the loggers that were asked for, opened: what one of them can't do shows before training.

    step: what they hold of later steps is from a start that was cut short, and TensorBoard drops it. started: when the run
    did, over all its starts. charts: scalars that stand together, see show_charts. Raises ConfigError.
    """
    loggers: list[Logger] = [JSONLLogger(folder)]
    for key, node in plain["logger"].items():
        try:
            logger = instantiate_checked(node, Logger, **_of_this_run(node, folder, step, started))
            if trainer.is_global_zero and not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(tensorboard_hparams.columns(plain))
        except Exception as error:  # each library has its own
            other = f"logger.{key}.offline=true" if node["_target_"] == WANDB else "logger=tensorboard"
            raise ConfigError(f"logger.{key}: can't be made: {last_line(error)}; type e.g. {other}") from error
        loggers.append(logger)
    trainer.loggers = loggers
    show_charts(trainer, charts or {})


def _of_this_run(node: Mapping[str, Any], folder: Path, step: int, started: str) -> dict[str, Any]:
    """What a logger is told that no config can know: where, and of which run."""
    name = "/".join(folder.parts[-3:])
    place = {} if "save_dir" in node else {"save_dir": folder}
    if node["_target_"] == TENSORBOARD:
        return place | {"purge_step": step}
    if node["_target_"] == WANDB:
        text = f"{folder.absolute()} {started}"  # the same for all starts of a run
        return place | {"name": name, "id": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}
    if node["_target_"] == MLFLOW:
        server = os.environ.get("MLFLOW_TRACKING_URI")  # never recorded: it may hold a password
        store = {} if "tracking_uri" in node else {"tracking_uri": server or MLFLOW_STORE}
        return place | store | {"run_name": name, "tags": {"started": started}}
    return place


def log_final_metrics(
    trainer: Trainer,
    metrics: Mapping[str, Estimate],
    samples: Sequence[Mapping[str, str]] = (),
    figures: Sequence[Path] = (),
) -> None:
    """Final metrics under eval/ for every logger; samples as a table and figures, PNG files, for TensorBoard."""
    step = trainer.global_step
    for logger in trainer.loggers:
        logger.log_metrics({f"eval/{name}": e.value for name, e in metrics.items()}, step=step)
    show_samples(trainer.loggers, samples, step)
    show_figures(trainer.loggers, figures, step)
    for logger in trainer.loggers:
        logger.save()
        logger.finalize("success")


def last_line(error: Exception) -> str:
    """What a library says in several lines, in the last one."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
