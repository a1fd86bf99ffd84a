"""The checkpoint callback: when a run is saved, what a checkpoint holds, and how training resumes from it exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from dpo_lab.distributed.collectives import all_gather_object
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.errors import check_at_least
from dpo_lab.runs import metrics_log
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training import rng_state
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.early_stopping import early_stopping_of
from dpo_lab.training.checkpoint_io import CheckpointError, by_step
from dpo_lab.training.loggers.jsonl import JSONLLogger
from dpo_lab.training.nonfinite import NotFinite, all_finite

KEY = "dpo_lab"  # key of this package's state in a checkpoint


class Checkpointing(Checkpoint):
    """Saves checkpoints/step=N.ckpt every `every_n_steps` optimizer steps, after the last step, and when asked to stop.

    The last `save_total_limit` checkpoints are kept, and that of the best policy if early stopping keeps it; then every
    validation has a checkpoint. A checkpoint is saved after the metrics of its step are logged and before validation.
    It records whether that validation is pending; a resumed run starts with it. Checkpoints contain neither
    frozen weights nor a reference that does not move.
    """

    def __init__(self, every_n_steps: int = 80, save_total_limit: int = 2) -> None:
        check_at_least("callbacks.checkpoint.every_n_steps", every_n_steps, 1, 80)
        check_at_least("callbacks.checkpoint.save_total_limit", save_total_limit, 2, 2)  # one could be damaged
        self.every_n_steps, self.save_total_limit = every_n_steps, save_total_limit
        self.saved = self.resumed = -1  # the step last saved, and the step resumed from
        self.pending_validation: dict[str, Any] | None = None  # the state of the run before a validation that is due
        self.random: dict[str, Any] | None = None  # random state of this rank, to be set before the next step

    @property
    def owes_validation(self) -> bool:
        """Whether a validation was due and has not finished; so if a run resumes when all its steps are trained."""
        return self.pending_validation is not None

    def on_train_start(self, trainer: Trainer, pl_module: BaseModule) -> None:
        if self.resumed < 0:
            _truncate_metrics_log(trainer, 0)  # of a run that was killed before its first checkpoint
        if self.owes_validation:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # else it skips as many batches as the validation before it had
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        if self.random is not None:
            rng_state.set_random_state(self.random, trainer.strategy.root_device)
            self.random = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        step = trainer.global_step
        self.pending_validation = _position(trainer) if _validation_is_due(trainer) else None
        stopping = early_stopping_of(trainer)
        may_be_best = self.owes_validation and stopping is not None and stopping.keeps_best
        if pl_module.stopping or may_be_best or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        if pl_module.stopping:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: BaseModule) -> None:
        if trainer.should_stop:  # early stopping: no later step saves a checkpoint
            self._save(trainer)
        self.pending_validation = None

    def on_train_end(self, trainer: Trainer, pl_module: BaseModule) -> None:
        self._save(trainer)
        _free_optimizers(trainer)

    def on_exception(self, trainer: Trainer, pl_module: BaseModule, exception: BaseException) -> None:
        if isinstance(exception, StopSignal):  # raised after a step that was saved
            _free_optimizers(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: BaseModule, checkpoint: dict[str, Any]) -> None:
        position = self.pending_validation or _position(trainer)
        state = {
            "random": rng_state.random_state(trainer.strategy.root_device),
            "metrics": rng_state.metric_state(pl_module.train_metrics),
        }
        finite = all_finite([checkpoint["state_dict"], checkpoint.get("optimizer_states", [])])
        ranks = all_gather_object((state, finite))
        if not all(is_finite for _, is_finite in ranks):
            raise NotFinite(
                f"step {trainer.global_step}: a weight or its optimizer state is not finite; the checkpoint before it stays"
                " the last one. Type a lower optim.lr, or trainer.precision=32-true"
            )
        for logger in _metrics_loggers(trainer):
            metrics_log.position(logger.path, durable=True)
        checkpoint["loops"]["fit_loop"] = position["loop"]
        checkpoint[KEY] = {
            "world_size": trainer.world_size,
            "ranks": [state for state, _ in ranks],
            "journal": position["journal"],
            "owes_validation": self.owes_validation,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: BaseModule, checkpoint: dict[str, Any]) -> None:
        step, state, path = checkpoint["global_step"], checkpoint.get(KEY), trainer.ckpt_path
        if not state or not all({"random", "metrics"} <= set(of_rank) for of_rank in state["ranks"]):
            raise CheckpointError(
                f"{path}: holds no state of the random generators, so a run resumed from it would differ;"
                " delete it, and the same command resumes from the one before"
            )
        self.saved = self.resumed = step
        ranks, rank = state["ranks"], trainer.global_rank
        metrics = [of_rank["metrics"] for of_rank in ranks]
        if state["world_size"] == trainer.world_size:
            rng_state.set_metric_state(pl_module.train_metrics, metrics[rank])
        elif rank == 0:
            rng_state.set_metric_state(pl_module.train_metrics, rng_state.sum_metric_states(metrics))
        if rank < len(ranks):
            self.random = ranks[rank]["random"]
        else:
            rng_state.seed_random(trainer.datamodule.seed, rank)  # type: ignore[union-attr]  # PairDataModule has one
        if state["owes_validation"]:
            position = {"loop": checkpoint["loops"]["fit_loop"], "journal": state["journal"]}
            self.pending_validation = copy.deepcopy(position)
        _truncate_metrics_log(trainer, state["journal"])
        _log_again(trainer, step)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self.saved or trainer.state.fn != TrainerFn.FITTING:
            return
        folder = Path(trainer.default_root_dir) / CHECKPOINTS
        trainer.save_checkpoint(folder / f"step={step}.ckpt", weights_only=False)
        self.saved = step
        if trainer.is_global_zero:
            paths = by_step(folder)
            kept = {
                *[at for at in paths if at <= step][-self.save_total_limit :]
            }  # later ones are damaged and were skipped
            stopping = early_stopping_of(trainer)
            if stopping is not None and stopping.keeps_best and stopping.best_step is not None:
                kept.add(stopping.best_step)
            for at in paths.keys() - kept:
                trainer.strategy.remove_checkpoint(paths[at])


def _free_optimizers(trainer: Trainer) -> None:
    """Free the optimizer state after it is saved; Lightning's teardown would copy it from the GPU to host memory."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()


def _position(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the loops and the length of the metrics log."""
    positions = [metrics_log.position(logger.path) for logger in _metrics_loggers(trainer)]
    return {"loop": copy.deepcopy(trainer.fit_loop.state_dict()), "journal": positions[0] if positions else 0}


def _validation_is_due(trainer: Trainer) -> bool:
    every, done = trainer.val_check_batch, trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.enable_validation and every and done % every == 0)


def _metrics_loggers(trainer: Trainer) -> list[JSONLLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, JSONLLogger)]


def _truncate_metrics_log(trainer: Trainer, size: int) -> None:
    for logger in _metrics_loggers(trainer):
        logger.truncate(size)


def _log_again(trainer: Trainer, step: int) -> None:
    """Log rows of the metrics log again to loggers that lost them when the run resumed from a step.

    TensorBoard is opened with a purge step, which removes that step and later ones; a CSV logger starts with an empty
    file.
    """
    for metrics_logger in _metrics_loggers(trainer) if trainer.is_global_zero else []:
        rows = list(metrics_log.rows(metrics_logger.path)) if metrics_logger.path.exists() else []
        for logger in trainer.loggers:
            for row in rows if not isinstance(logger, JSONLLogger) else []:
                is_purged = isinstance(logger, TensorBoardLogger) and row["step"] == step
                if is_purged or isinstance(logger, CSVLogger):
                    logger.log_metrics({name: v for name, v in row.items() if name != "step"}, step=row["step"])
