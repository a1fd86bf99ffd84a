"""DeepSpeed's ZeRO, stages 2 and 3, as a strategy of Lightning's that makes the very steps that one process makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy, Strategy
from torch.optim import Optimizer

from dpo_lab.training.sharding import entire

if TYPE_CHECKING:
    from dpo_lab.training.step import StepModule


class Zero(DeepSpeedStrategy):
    """Gradients and optimizer state (stage 2), or weights as well (3), cut over the ranks by DeepSpeed.

    It computes in the dtype that weights are kept in. A checkpoint holds the whole weights, by rank 0, and no optimizer
    state: such a run can't be resumed.
    """

    passes_together = True

    def __init__(self, stage: int, persistence: int = 100_000) -> None:
        """persistence: a weight of fewer numbers stays whole on every rank in stage 3."""
        cutting: dict[str, Any] = {"stage": stage}
        if stage == 3:
            cutting["stage3_param_persistence_threshold"] = persistence
        super().__init__(config={"zero_optimization": cutting, "zero_allow_untested_optimizer": True})

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks every device for its number

    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_environment()
        else:
            ParallelStrategy.setup_environment(self)  # DeepSpeed itself runs without a GPU as well
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        module: StepModule = self.lightning_module  # type: ignore[assignment]
        assert isinstance(self.config, dict)
        self.config["gradient_clipping"] = module.optim.max_grad_norm or 0.0  # the gradients are DeepSpeed's alone
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(False)  # else every backward begins the gradient anew
        yield
        engine.optimizer.clear_backward_seen_flag()  # as the engine's forward would: one of it is a step of ours
        engine.set_gradient_accumulation_boundary(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        whole = {name: entire(tensor).detach().cpu() for name, tensor in self.lightning_module.named_parameters()}
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        raise MisconfigurationException(
            f"{checkpoint_path}: a run under DeepSpeed keeps no optimizer state to go on from; type name=another for a new"
            " run, with trainer=fsdp for one that can be resumed"
        )
