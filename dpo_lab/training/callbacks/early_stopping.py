"""The early stopping callback, and the policy that is kept then: the best one or the last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from transformers import PreTrainedModel

from dpo_lab.models.sharded_weights import load_full
from dpo_lab.models.sharding import is_sharded
from dpo_lab.runs.run_record import CHECKPOINTS, RunFailed
from dpo_lab.training.checkpoint_io import CheckpointError, VerifiedCheckpointIO

BEST, LAST = "best", "last"


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's EarlyStopping, which also records the step of the best validation.

    policy_to_keep: `best` or `last`, the policy that is saved and evaluated when training ends, early or not. For
    `best` every validation has a checkpoint, and the checkpoint of the best one is kept until there is a better one.
    """

    def __init__(self, monitor: str, policy_to_keep: str = BEST, **settings: Any) -> None:
        super().__init__(monitor, **settings)
        if policy_to_keep not in (BEST, LAST):
            raise ValueError(
                f"callbacks.early_stopping.policy_to_keep={policy_to_keep}: must be best or last; type"
                " callbacks.early_stopping.policy_to_keep=best"
            )
        self.policy_to_keep = policy_to_keep
        self.best_step: int | None = None
        self.best_value = math.nan

    @property
    def keeps_best(self) -> bool:
        return self.policy_to_keep == BEST

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_step": self.best_step, "best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best_step, self.best_value = state_dict["best_step"], state_dict["best_value"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for the end and record the best step; raise RunFailed if the monitored metric is not logged."""
        if trainer.sanity_checking:
            return
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            names = ", ".join(sorted(name for name in logged if name.startswith("val/")))
            raise RunFailed(
                f"callbacks.early_stopping.monitor={self.monitor}: no validation logs it; type"
                f" callbacks.early_stopping.monitor= one of {names}"
            )
        value = float(logged[self.monitor])
        is_better = value < self.best_value if self.mode == "min" else value > self.best_value
        if math.isfinite(value) and (self.best_step is None or is_better):
            self.best_step, self.best_value = trainer.global_step, value
        super().on_validation_end(trainer, pl_module)


def early_stopping_of(trainer: Trainer) -> EarlyStopping | None:
    """Return the trainer's first EarlyStopping callback, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, EarlyStopping)), None)  # type: ignore[attr-defined]


def keep_policy(trainer: Trainer, model: PreTrainedModel) -> dict[str, Any]:
    """Load the weights of the policy to keep into `model`, the trained one; return the entry of the run record.

    All ranks have to call it. Without early stopping it does nothing and returns {}.
    """
    stopping = early_stopping_of(trainer)
    if stopping is None:
        return {}
    last, best = trainer.global_step, stopping.best_step
    is_best = stopping.keeps_best and best is not None
    if is_best and best != last:
        path = Path(trainer.default_root_dir) / CHECKPOINTS / f"step={best}.ckpt"
        if not path.exists():
            raise CheckpointError(
                f"{path}: the checkpoint of the best policy is missing; put it back, or type"
                " callbacks.early_stopping.policy_to_keep=last name=another"
            )
        saved = VerifiedCheckpointIO(maps=is_sharded(model)).load_checkpoint(path)["state_dict"]
        weights = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
        assert {name for name, p in model.named_parameters() if p.requires_grad} <= weights.keys()
        load_full(model, weights, strict=False)  # frozen weights are not stored, a tied weight may be stored once
    kept = {
        "policy": BEST if is_best else LAST,
        "step": best if is_best else last,
        "last_step": last,
        "stopped_early": last < trainer.max_steps,
        "monitor": stopping.monitor,
        "best_step": best,
        "best_value": stopping.best_value if best is not None else None,
    }
    return {"early_stopping": kept}
