"""Set-up that runs and evaluations share: torch and libraries, the Trainer, the process group, and the run's log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import distributed
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config.allowed_targets import TargetRefused, instantiate_checked
from dpo_lab.config.precision import check_device_precision
from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.methods import Online
from dpo_lab.errors import LabError
from dpo_lab.models.policy import Pretrained
from dpo_lab.pipelines.inputs import Forward
from dpo_lab.pipelines.loggers import last_line
from dpo_lab.runs.atomic_write import explain_disk_error
from dpo_lab.runs.out_of_memory import OutOfMemory, explain_out_of_memory, halved
from dpo_lab.runs.redact import Redacting
from dpo_lab.runs.run_record import RunFailed
from dpo_lab.terminal.progress import log_handler
from dpo_lab.training.callbacks.progress_bar import TimeLimit
from dpo_lab.training.callbacks.throughput import Throughput
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO
from dpo_lab.training.strategies.fsdp import FSDP2Strategy
from dpo_lab.training.torch_setup import set_up_device, setup_torch

log = logging.getLogger("dpo_lab")

T = TypeVar("T")


def setup_process(config: RunConfig) -> None:
    """Check the packages that the task needs, and set up torch and the logging of libraries in this process."""
    if config.data.uses_task:
        config.data.task.check()
    disable_progress_bar()  # transformers' progress bars last milliseconds here
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    setup_torch(config.threads, on_cpu=config.trainer.get("accelerator") == "cpu")


def make_trainer(config: RunConfig, config_dict: dict[str, Any], folder: Path) -> Trainer:
    """Return Lightning's Trainer with its callbacks and without loggers. Raise ConfigError if it can't be created."""
    settings = dict(config_dict["trainer"])
    try:
        callbacks = [instantiate_checked(node, Callback) for node in config_dict["callbacks"].values()]
        callbacks += [Throughput(), TimeLimit(settings.pop("max_time", None))]
        plan = {"default_root_dir": folder, "use_distributed_sampler": False, "plugins": [VerifiedCheckpointIO()]}
        trainer = instantiate_checked(settings, Trainer, logger=False, callbacks=callbacks, **plan)
        check_device_precision(settings, trainer)
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.check_mesh()
    except (HydraException, TargetRefused) as error:
        raise ConfigError(f"the trainer or a callback can't be created: {last_line(error)}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"the trainer can't be created: {last_line(error)}") from error
    ranks, method = trainer.world_size, config.method
    if not isinstance(method, Online) and config.data.batch_size < ranks:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: {ranks} devices need a pair each in every step; type"
            f" data.batch_size={ranks} or more"
        )
    if isinstance(method, Online) and method.prompts_per_step < ranks:
        raise ConfigError(
            f"method.prompts={method.prompts}: {ranks} devices need a prompt each in every step; type"
            f" method.prompts={ranks * method.minibatches} or more"
        )
    set_up_device(trainer.strategy)
    return trainer


def forward_settings(trainer: Trainer) -> Forward:
    """Return how forward passes outside of training run: as the trainer runs them.

    The process group has to be initialised if the strategy shards the model.
    """
    strategy = trainer.strategy
    sharding = strategy.sharding if isinstance(strategy, FSDP2Strategy) and distributed.is_initialized() else None
    return Forward(strategy.root_device, trainer.precision_plugin.forward_context, sharding)


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log this package's messages to the terminal and to `run.log`, which also gets warnings and the error."""
    console, file = log_handler(), logging.FileHandler(folder / "run.log")
    file.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    for handler in (console, file):
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.captureWarnings(True)  # libraries' warnings go to the file, not between progress bars
    logging.getLogger("py.warnings").addHandler(file)
    logging.getLogger("py.warnings").propagate = False
    try:
        yield
    except Exception as error:
        if isinstance(error, LabError) and not isinstance(error, RunFailed):
            raise  # what the user can fix: the command prints it in one line
        if line := str(error) if isinstance(error, RunFailed) else explain_disk_error(error):
            where = (type(error), error, error.__traceback__) if isinstance(error, OutOfMemory) else None
            entry = {"levelname": "ERROR", "msg": f"the run failed: {line}", "exc_info": where}
            file.handle(logging.makeLogRecord(entry))
        else:
            log.exception("the run failed")
        raise
    finally:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)


def memory_explained(
    config: RunConfig, where: str, trains: bool = False, tokens: int | None = None
) -> AbstractContextManager[None]:
    """Return a context that explains out of memory by the settings of passes over a model, and of training if it
    `trains`.

    tokens: of a micro-batch, if not those of the config.
    """
    settings = halved("data.tokens_per_microbatch", tokens or config.data.forward_tokens)
    if trains and not config.policy.gradient_checkpointing:
        settings.append("policy.gradient_checkpointing=true")
    if trains and isinstance(config.policy, Pretrained) and not config.policy.has_adapters:
        settings.append("policy.lora.r=16 optim=lora")
    return explain_out_of_memory(where, *settings)


def broadcast_from_rank_zero(trainer: Trainer, decide: Callable[[], T]) -> T:
    """Call decide() on rank 0 and return its result on every rank; raise its refusal on every rank."""
    decision: Any = None
    refusal: Exception | None = None
    if trainer.is_global_zero:
        try:
            decision = decide()
        except LabError as error:
            refusal = error
    decision, refusal = trainer.strategy.broadcast((decision, refusal))
    if refusal is not None:
        raise refusal
    return decision


@contextmanager
def process_group(trainer: Trainer) -> Iterator[None]:
    """Initialise the process group if there are several ranks or the model is sharded, and destroy it at the end."""
    if trainer.world_size > 1 or isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.setup_environment()
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
