"""Arguments of Lightning's Trainer that a config cannot set, with what to type instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTH = (
    "a run has no epochs, and a step is data.batch_size pairs; its length is trainer.max_steps (epochs x training pairs /"
    " data.batch_size), its validations trainer.val_check_interval"
)
FEWER_PAIRS = "every step and every validation takes its pairs in a fixed order; type data.pairs=N for fewer"
LOOPS = "a run only trains and validates; leave it out"

# argument -> the one value that has no effect, and what to type instead ({value}: the given value)
REFUSED: dict[str, tuple[Any, str]] = {
    "max_epochs": (-1, LENGTH),
    "min_epochs": (None, LENGTH),
    "min_steps": (None, LENGTH),
    "check_val_every_n_epoch": (None, LENGTH),
    "reload_dataloaders_every_n_epochs": (0, LENGTH),
    "accumulate_grad_batches": (
        1,
        "a step is data.batch_size pairs, split into micro-batches that fit into memory; type data.batch_size=N, and"
        " data.tokens_per_microbatch=N for less memory",
    ),
    "gradient_clip_val": (None, "a step clips its own gradient, by its norm; type optim.max_grad_norm={value}"),
    "gradient_clip_algorithm": (None, "a gradient is clipped by its norm; type optim.max_grad_norm=1.0"),
    "fast_dev_run": (False, "type trainer.max_steps=2 evals.num_prompts=8 for a short run"),
    "overfit_batches": (0.0, FEWER_PAIRS),
    "limit_train_batches": (None, FEWER_PAIRS),
    "limit_val_batches": (
        None,
        "a validation is over all held-out pairs; type data.validation_pairs=N, or a larger trainer.val_check_interval",
    ),
    "limit_test_batches": (None, LOOPS),
    "limit_predict_batches": (None, LOOPS),
    "barebones": (False, "a run logs and saves; type logger=csv for less logging"),
    "enable_checkpointing": (True, "a run always saves; type callbacks.checkpoint.every_n_steps=N to save less often"),
    "logger": (None, "type logger=tensorboard, csv, wandb or mlflow, without trainer."),
    "callbacks": (None, "type callbacks=default or callbacks=early_stopping, without trainer."),
    "plugins": (None, "the run sets it, to verify its checkpoints; leave it out"),
    "default_root_dir": (None, "a run's folder is outputs/NAME/OVERRIDES/seed=N; type name=NAME, without trainer."),
    "use_distributed_sampler": (False, "the run divides its pairs over ranks itself; leave it out"),
}

# arguments that a config may set although no YAML file of this project does
ADDED = ("max_time", "deterministic", "benchmark", "detect_anomaly", "profiler", "inference_mode", "sync_batchnorm")


def advice(name: str, value: Any) -> str | None:
    """Return what to type for the Trainer's argument `name` if its key is not in the config; None if unknown."""
    if name in ADDED:
        return f"has to be added to the trainer's keys; type +trainer.{name}={value}"
    if name not in REFUSED:
        return None
    return REFUSED[name][1].replace("{value}", str(value))


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError, with one line that says what to type, if the Trainer has a setting that is not supported."""
    for name, example in (("max_steps", 160), ("val_check_interval", 80), ("log_every_n_steps", 10)):
        if not isinstance(trainer.get(name), int) or trainer[name] < 1:
            raise ValueError(
                f"trainer.{name}={trainer.get(name)}: must be a whole number of optimizer steps, 1 or more;"
                f" type e.g. trainer.{name}={example}"
            )
    for name, (default, _) in REFUSED.items():
        if name in trainer and trainer[name] is not None and trainer[name] != default:
            raise ValueError(f"trainer.{name}={trainer[name]}: {advice(name, trainer[name])}")
