"""Training under FSDP2: a Lightning strategy, and the trained policy gathered from the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.models.policy import trainable_copy

if TYPE_CHECKING:
    from dpo_lab.training.base_module import BaseModule


class FSDP2Strategy(ModelParallelStrategy):
    """A strategy that shards weights, gradients and optimizer state over ranks; a layer is gathered when it is used.

    Checkpoints are the same as those of one process: a single file with full tensors, optimizer state keyed by torch's
    parameter numbers, written by rank 0. They are saved and loaded by the checkpoint plugin, so that any number of
    ranks can resume from them.
    """

    shards_model = True

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        if self.lightning_module is None:  # the process group is set up before there is a module to shard
            ParallelStrategy.setup_environment(self)
            self._setup_distributed()
            return
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().validation_step(*args, **kwargs)
        assert isinstance(self.lightning_module, FSDPModule)
        self.lightning_module.reshard()  # FSDP would only do so in a backward pass, which validation has not
        return output

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._gathered(inner.state_dict())

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        shards = self.lightning_module.state_dict()
        full = checkpoint["state_dict"]
        sharded = {name: _like(tensor, shards[name]) if name in shards else tensor for name, tensor in full.items()}
        self.lightning_module.load_state_dict(sharded, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, full in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _like(value, parameters[number]) for name, value in values.items()}
                for number, values in full["state"].items()
            }
            optimizer.load_state_dict({**full, "state": state})

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gather full tensors to the CPU of rank 0; return {} on other ranks, which have to call it too."""

        def gather(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()
            return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else value

        full = tree_map(gather, state)
        return full if self.is_global_zero else {}


def shard(module: BaseModule) -> None:
    """Shard the module's model over ranks: each layer on its own, all other parameters together.

    A step calls methods of the module instead of the model's `forward`. They are registered with FSDP so that they
    gather the parameters outside of layers (the embedding, the LM head), as FSDP does around `forward`.
    """
    assert module.device_mesh is not None
    mesh = module.device_mesh["data_parallel"]
    for layer in [m for m in module.model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in module.FORWARDS:
        register_fsdp_forward_method(module, method)


def gather_model(model: PreTrainedModel, initial: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a trained model unsharded, on `device`: the model itself, or if it is sharded a copy of `initial` with its
    weights.

    A collective: all ranks have to call it before the process group ends; all get the same result.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model.to(device)  # type: ignore[arg-type]
    copy = trainable_copy(initial).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for (name, trained), (same, parameter) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
            assert name == same
            if parameter.requires_grad:  # other parameters are frozen and shared with `initial`
                parameter.copy_(full_tensor(trained))
    return copy


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a weight sharded by FSDP, a collective of all ranks; otherwise the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Any, sharded: Tensor) -> Any:
    """Shard a tensor as `sharded` is; return values that are not a tensor of its shape unchanged."""
    if not isinstance(sharded, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != sharded.shape:
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements)
