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
    """Each rank keeps a part of every weight, of its gradient and of its optimizer state, and gathers a layer to use it.

    Checkpoints are what one process writes: whole tensors, the optimizer's under the numbers that torch gives them, in a
    single file by rank 0. They go through the checkpoint plugin, both ways, so that any number of ranks resumes from them.
    """

    passes_together = True

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        if self.lightning_module is None:  # ranks meet before there is a module to cut
            ParallelStrategy.setup_environment(self)
            self._setup_distributed()
            return
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().validation_step(*args, **kwargs)
        assert isinstance(self.lightning_module, FSDPModule)
        self.lightning_module.reshard()  # it waits for a backward, and none comes
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
        parts = self.lightning_module.state_dict()
        whole = checkpoint["state_dict"]
        cut = {name: _like(tensor, parts[name]) if name in parts else tensor for name, tensor in whole.items()}
        self.lightning_module.load_state_dict(cut, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _like(value, parameters[number]) for name, value in values.items()}
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same with whole tensors, on the CPU of rank 0; nothing on the others, who have to take part."""

        def gather(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()
            return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else value

        whole = tree_map(gather, state)
        return whole if self.is_global_zero else {}


def shard(module: BaseModule) -> None:
    """Cut the module's model over the ranks: layer by layer, and what is in no layer together.

    What a step computes from goes through the module's own methods, not through the model's `forward`: these gather what is
    in no layer (the embedding, the LM head) as FSDP does around a forward.
    """
    assert module.device_mesh is not None
    mesh = module.device_mesh["data_parallel"]
    for layer in [m for m in module.model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in module.FORWARDS:
        register_fsdp_forward_method(module, method)


def gather_model(model: PreTrainedModel, initial: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A trained model as any other, on `device`: itself where nothing has cut it, else a copy of `initial` with its weights.

    All ranks have to call it, while they can still reach each other; all get the same.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model.to(device)  # type: ignore[arg-type]
    copy = trainable_copy(initial).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for (name, trained), (same, parameter) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
            assert name == same
            if parameter.requires_grad:  # the rest is frozen and shared with `initial`
                parameter.copy_(full_tensor(trained))
    return copy


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a weight that FSDP has sharded, for which all ranks have to ask; else the weight itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Any, part: Tensor) -> Any:
    """A whole tensor cut as `part` is; what is no tensor of its shape stays as it is."""
    if not isinstance(part, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != part.shape:
        return tensor
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements)
