"""What every run does around its fit: set the process up, hold the folder, make the Trainer, log, time the stages, fit."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.logging import RichHandler
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config import ConfigError, RunConfig
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.module import PreferenceDataModule
from dpo_lab.data.rows import BadData
from dpo_lab.prepare import Forward, Material
from dpo_lab.results import runs
from dpo_lab.results.card import table
from dpo_lab.results.estimates import Estimate
from dpo_lab.stop import StopRequest
from dpo_lab.training.callbacks import HParams
from dpo_lab.training.checkpoint import VerifiedCheckpointIO
from dpo_lab.training.journal import Journal
from dpo_lab.training.process import set_up_process
from dpo_lab.training.saving import Checkpoints
from dpo_lab.training.step import StepModule

log = logging.getLogger("dpo_lab")


def live(
    config: RunConfig,
    plain: dict[str, Any],
    folder: Path,
    *,
    whole: Callable[[runs.Run], None],
    as_rank: Callable[[], None],
    again: Callable[[dict[str, Any]], None],
) -> None:
    """Run `config` in `folder`: the whole run by rank 0, who holds the folder, the fit alone by every further rank.

    plain: the config as it is recorded; again(record): what a finished run, which is left alone, has to say.
    """
    set_up(config)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        as_rank()
        return
    with runs.hold(folder, plain, list(HydraConfig.get().overrides.task)) as held, logged(folder):
        if held is None:
            print(f"{folder}: this run is done already. Type name=another for a second one; its figures:")
            record = runs.read_record(folder)
            assert record is not None
            again(record)
        else:
            whole(held)


def set_up(config: RunConfig) -> None:
    """Get the process ready to compute."""
    if config.data.is_world:
        config.data.world.check()
    disable_progress_bar()  # transformers' own bars, of milliseconds here
    set_up_process(config.threads, on_cpu=config.trainer.get("accelerator") == "cpu")


def make_trainer(config: RunConfig, plain: dict[str, Any], folder: Path) -> Trainer:
    """Lightning's Trainer from its node, with loggers and callbacks."""
    settings = dict(plain["trainer"])
    try:
        loggers = [instantiate(node, save_dir=folder) for node in plain["logger"].values()]
        callbacks = [instantiate(node) for node in plain["callbacks"].values()]
        loggers.append(Journal(folder))
        callbacks.append(HParams(_hparams(plain)))
        plan = {"default_root_dir": folder, "use_distributed_sampler": False, "plugins": [VerifiedCheckpointIO()]}
        trainer = instantiate(settings, logger=loggers, callbacks=callbacks, **plan)
    except HydraException as error:
        raise ConfigError(f"the trainer, a logger or a callback can't be made: {_last_line(error)}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"the trainer can't be made: {_last_line(error)}") from error
    if config.data.batch_size < trainer.world_size:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: {trainer.world_size} devices need a pair each in every step;"
            f" type data.batch_size={trainer.world_size} or more"
        )
    return trainer


def _hparams(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a reader of HPARAMS compares runs by: choices and numbers, no classes."""
    shown = {k: v for k, v in plain.items() if k not in ("trainer", "logger", "callbacks", "name")}
    return {k: v for k, v in runs.flatten(shown).items() if v is not None}


def forward_of(trainer: Trainer) -> Forward:
    """What the trainer's forwards run on and under."""
    return Forward(trainer.strategy.root_device, trainer.precision_plugin.forward_context)


def fit(
    config: RunConfig, trainer: Trainer, module: StepModule, material: Material, checkpoint: Path | None = None
) -> None:
    """Train the module's model on the material's token ids, up to max_steps, from the first step or on from a checkpoint.

    A checkpoint of the last step is there when it returns. Raises Stopped, saved, when the run is asked to stop. Ranks stay
    joined.
    """
    data = PreferenceDataModule(
        material.train,
        material.held_out,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    if config.policy.gradient_checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    with StopRequest() as module.request:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
        if any(isinstance(callback, Checkpoints) and callback.owes_validation for callback in callbacks):
            trainer.validate(module, datamodule=data, verbose=False)  # it was stopped between its last step and this
    if module.request.signum is not None:  # it came when no step was left to finish
        signal.raise_signal(module.request.signum)


def to_tensorboard(
    trainer: Trainer, metrics: Mapping[str, Estimate], samples: Sequence[Mapping[str, str]] = ()
) -> None:
    """Final metrics under eval/ for every logger; samples, where there are any, as a table where the logger takes text."""
    for logger in trainer.loggers:
        logger.log_metrics({f"eval/{name}": e.value for name, e in metrics.items()}, step=trainer.global_step)
        if samples and isinstance(logger, TensorBoardLogger):
            rows = [[row[key] for key in ("prompt", "initial", "trained")] for row in samples[:16]]
            lines = table(("prompt", "initial policy", "trained policy"), rows)
            logger.experiment.add_text("samples", "\n".join(lines), trainer.global_step)
        logger.save()
        logger.finalize("success")


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Our own lines on the terminal and in the run's log file."""
    console, file = RichHandler(show_path=False, log_time_format="%X"), logging.FileHandler(folder / "run.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in (console, file):
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.captureWarnings(True)  # libraries' warnings go to the file, not between the bars
    logging.getLogger("py.warnings").addHandler(file)
    logging.getLogger("py.warnings").propagate = False
    try:
        yield
    except (ConfigError, BadData, NoTemplate):
        raise  # the door says it in one line
    except Exception:
        log.exception("the run failed")
        raise
    finally:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)


class Clock:
    """Wall and CPU seconds of each stage, of this process and its threads."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.last = (time.perf_counter(), time.process_time())

    def lap(self, stage: str) -> dict[str, dict[str, float]]:
        """End a stage; gives all stages so far."""
        now = (time.perf_counter(), time.process_time())
        self.stages[stage] = {"wall": round(now[0] - self.last[0], 2), "cpu": round(now[1] - self.last[1], 2)}
        self.last = now
        return dict(self.stages)


def _last_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[-1]
