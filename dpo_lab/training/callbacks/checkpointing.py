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
from dpo_lab.runs import metrics_log
from dpo_lab.runs.run_record import CHECKPOINTS
from dpo_lab.training import rng_state
from dpo_lab.training.base_module import BaseModule
from dpo_lab.training.callbacks.early_stopping import early_stopping_of
from dpo_lab.training.checkpoint_io import CheckpointError, by_step
from dpo_lab.training.loggers.jsonl import JSONLLogger
from dpo_lab.training.nonfinite import NotFinite, all_finite

OURS = "dpo_lab"  # our part of a checkpoint


class Checkpointing(Checkpoint):
    """Saves checkpoints/step=N.ckpt every so many optimizer steps, after the last one, and when the run is asked to stop.

    The last `keep` stay, and that of the best policy where early stopping keeps it: there every validation has one. A
    checkpoint is taken when a step's own figures are logged and before its validation, which it then notes as owed; going on
    from it starts with what is owed. The reference is never in it.
    """

    def __init__(self, every_n_steps: int = 80, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_steps={every_n_steps}: must be 1 or more; type e.g. 80")
        if keep < 2:
            raise ValueError(f"callbacks.checkpoint.keep={keep}: must be 2 or more; one could be damaged; type 2")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.saved = self.resumed = -1  # at which step
        self.owed: dict[str, Any] | None = None  # the run as it was before a validation that is due
        self.random: dict[str, Any] | None = None  # of this rank, to be set before the next step

    @property
    def owes_validation(self) -> bool:
        """Whether a validation was due and has not been finished: fit ends so where there was no step left to train."""
        return self.owed is not None

    def on_train_start(self, trainer: Trainer, pl_module: BaseModule) -> None:
        if self.resumed < 0:
            _rewind(trainer, 0)  # of a run that was killed before its first checkpoint
        if self.owes_validation:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # else it would leave out as many batches as the one before it had
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        if self.random is not None:
            rng_state.set_random_state(self.random, trainer.strategy.root_device)
            self.random = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        step = trainer.global_step
        self.owed = _now(trainer) if _validation_is_due(trainer) else None
        stopping = early_stopping_of(trainer)
        may_be_best = self.owes_validation and stopping is not None and stopping.keeps_best
        if pl_module.stopping or may_be_best or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: BaseModule, *args: Any) -> None:
        if pl_module.stopping:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: BaseModule) -> None:
        if trainer.should_stop:  # early: no step will come that saves
            self._save(trainer)
        self.owed = None

    def on_train_end(self, trainer: Trainer, pl_module: BaseModule) -> None:
        self._save(trainer)
        _free_optimizers(trainer)

    def on_exception(self, trainer: Trainer, pl_module: BaseModule, exception: BaseException) -> None:
        if isinstance(exception, StopSignal):  # after a step that was saved
            _free_optimizers(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: BaseModule, checkpoint: dict[str, Any]) -> None:
        now = self.owed or _now(trainer)
        state = {
            "random": rng_state.random_state(trainer.strategy.root_device),
            "metrics": rng_state.metric_state(pl_module.train_metrics),
        }
        finite = all_finite([checkpoint["state_dict"], checkpoint.get("optimizer_states", [])])
        ranks = all_gather_object((state, finite))
        if not all(is_finite for _, is_finite in ranks):
            raise NotFinite(
                f"step {trainer.global_step}: a weight or the optimizer's memory of it is not finite; the checkpoint"
                " before it stays the last one. Type a lower optim.lr, or trainer.precision=32-true"
            )
        for logger in _journals(trainer):
            metrics_log.position(logger.path, durable=True)
        checkpoint["loops"]["fit_loop"] = now["loop"]
        checkpoint[OURS] = {
            "world_size": trainer.world_size,
            "ranks": [state for state, _ in ranks],
            "journal": now["journal"],
            "owes_validation": self.owes_validation,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: BaseModule, checkpoint: dict[str, Any]) -> None:
        step, ours, path = checkpoint["global_step"], checkpoint.get(OURS), trainer.ckpt_path
        if not ours or not all({"random", "metrics"} <= set(state) for state in ours["ranks"]):
            raise CheckpointError(
                f"{path}: holds no state of the random generators, so going on from it would be another run;"
                " delete it, and the same command goes on from the one before"
            )
        self.saved = self.resumed = step
        ranks, rank = ours["ranks"], trainer.global_rank
        metrics = [state["metrics"] for state in ranks]
        if ours["world_size"] == trainer.world_size:
            rng_state.set_metric_state(pl_module.train_metrics, metrics[rank])
        elif rank == 0:
            rng_state.set_metric_state(pl_module.train_metrics, rng_state.sum_metric_states(metrics))
        if rank < len(ranks):
            self.random = ranks[rank]["random"]
        else:
            rng_state.seed_random(trainer.datamodule.seed, rank)  # type: ignore[union-attr]  # ours has one
        if ours["owes_validation"]:
            self.owed = copy.deepcopy({"loop": checkpoint["loops"]["fit_loop"], "journal": ours["journal"]})
        _rewind(trainer, ours["journal"])
        _log_again(trainer, step)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self.saved or trainer.state.fn != TrainerFn.FITTING:
            return
        folder = Path(trainer.default_root_dir) / CHECKPOINTS
        trainer.save_checkpoint(folder / f"step={step}.ckpt", weights_only=False)
        self.saved = step
        if trainer.is_global_zero:
            found = by_step(folder)
            kept = {*[at for at in found if at <= step][-self.keep :]}  # later ones were damaged and passed over
            stopping = early_stopping_of(trainer)
            if stopping is not None and stopping.keeps_best and stopping.best_step is not None:
                kept.add(stopping.best_step)
            for at in found.keys() - kept:
                trainer.strategy.remove_checkpoint(found[at])


def _free_optimizers(trainer: Trainer) -> None:
    """Free the optimizers' state once it is saved: Lightning's teardown would copy it from the GPU to the host's memory."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()


def _now(trainer: Trainer) -> dict[str, Any]:
    """Where the loops and the journal stand."""
    positions = [metrics_log.position(logger.path) for logger in _journals(trainer)]
    return {"loop": copy.deepcopy(trainer.fit_loop.state_dict()), "journal": positions[0] if positions else 0}


def _validation_is_due(trainer: Trainer) -> bool:
    every, done = trainer.val_check_batch, trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.enable_validation and every and done % every == 0)


def _journals(trainer: Trainer) -> list[JSONLLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, JSONLLogger)]


def _rewind(trainer: Trainer, to: int) -> None:
    for logger in _journals(trainer):
        logger.rewind(to)


def _log_again(trainer: Trainer, step: int) -> None:
    """What loggers have lost by going back to a step, told to them from the journal.

    TensorBoard is opened so that it forgets the step itself and what came after; a CSV logger starts with an empty file.
    """
    for kept in _journals(trainer) if trainer.is_global_zero else []:
        rows = list(metrics_log.rows(kept.path)) if kept.path.exists() else []
        for logger in trainer.loggers:
            for row in rows if not isinstance(logger, JSONLLogger) else []:
                again = isinstance(logger, TensorBoardLogger) and row["step"] == step
                if again or isinstance(logger, CSVLogger):
                    logger.log_metrics({name: v for name, v in row.items() if name != "step"}, step=row["step"])
