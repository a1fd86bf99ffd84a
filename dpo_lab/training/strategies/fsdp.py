"""Training under FSDP2: a Lightning strategy whose checkpoints are those of one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dpo_lab.models.sharded_weights import load_full, shard_like
from dpo_lab.models.sharding import Sharding
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO


class FSDP2Strategy(ModelParallelStrategy):
    """A strategy that shards weights, gradients and optimizer state over ranks; a layer is gathered when it is used.

    Checkpoints are the same as those of one process: a single file with full tensors, optimizer state keyed by torch's
    parameter numbers, written by rank 0. They are saved and loaded by the checkpoint plugin, so that any number of
    ranks can resume from them.

    Under bf16-mixed, weights are gathered in bfloat16 and gradients reduced in float32. mesh: two numbers; weights are
    sharded over groups of the second number of ranks, and each group is a copy of the others (HSDP; None: one group of
    all ranks). offload: keep shards, gradients and optimizer state in the memory of the host, where the optimizer
    computes.
    """

    shards_model = True

    def __init__(
        self, process_group_backend: str | None = None, mesh: Sequence[int] | None = None, offload: bool = False
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.mesh, self.offload = None if mesh is None else tuple(mesh), offload

    def check_mesh(self) -> None:
        """Raise MisconfigurationException if the mesh is not two numbers whose product is the number of ranks."""
        ranks = self.num_nodes * self.num_processes
        is_pair = self.mesh is None or (len(self.mesh) == 2 and all(isinstance(n, int) and n > 0 for n in self.mesh))
        if self.mesh is not None and not (is_pair and math.prod(self.mesh) == ranks):
            raise MisconfigurationException(
                f"trainer.strategy.mesh={list(self.mesh)}: must be two numbers, of copies and of ranks that share one,"
                f" whose product is the number of devices, {ranks}; type trainer.strategy.mesh=[1,{ranks}], or null"
            )

    @cached_property
    def sharding(self) -> Sharding:
        """How models are sharded; the process group has to be initialised."""
        ranks = distributed.get_world_size()
        shape, names = ((ranks,), ("shard",)) if self.mesh is None else (self.mesh, ("replicate", "shard"))
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        return Sharding(mesh, self.root_device, dtype, self.offload)

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        if self.lightning_module is not None:  # the process group is set up before there is a module
            self._device_mesh = self.lightning_module._device_mesh = self.sharding.mesh

    def model_to_device(self) -> None:
        """Move what is not sharded, such as metrics; sharded models are where they have to be."""
        assert self.lightning_module is not None
        modules = self.lightning_module._modules
        sharded = {
            name: child
            for name, child in modules.items()
            if child is not None and any(isinstance(module, FSDPModule) for module in child.modules())
        }
        modules.update(dict.fromkeys(sharded))
        self.lightning_module.to(self.root_device)
        modules.update(sharded)

    def _get_process_group_backend(self) -> str:
        if self.offload and self.root_device.type == "cuda":  # norms of gradients on the host are reduced there
            return self.process_group_backend or "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

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
        if isinstance(self.checkpoint_io, VerifiedCheckpointIO):
            self.checkpoint_io.maps = True  # a rank uses its shards alone
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_full(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, full in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
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
