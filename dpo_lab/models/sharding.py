"""A model sharded over ranks by FSDP2: how it is sharded, and its forward passes, which all ranks run together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.distributed.collectives import all_reduce_max, rank_and_world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compute = TypeVar("Compute", bound=Callable[..., Any])


@dataclass(frozen=True)
class Sharding:
    """How models are sharded: each layer is a unit, all other weights are another; a unit is gathered when it is used.

    mesh: of one dimension, or of two: weights are sharded over the ranks of the last one and replicated over the first;
    device: computes; dtype: of gathered weights (None: their own); gradients are reduced in float32; offload: shards,
    gradients and optimizer state stay in the memory of the host.
    """

    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype | None = None
    offload: bool = False

    def shard(self, model: Any) -> None:
        """Shard a model in place, unless it is sharded already; its weights may be on the meta device."""
        if is_sharded(model):
            return
        skeleton = on_meta(model)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=self.dtype,
                reduce_dtype=None if self.dtype is None else torch.float32,
                cast_forward_inputs=False,  # activations stay as autocast has them
            ),
            "offload_policy": CPUOffloadPolicy(self.device.type == "cuda") if self.offload else OffloadPolicy(),
        }
        for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        if self.dtype is not None:
            _keep_activations(model)
        sharded = model.sharded = Sharded(self, skeleton)
        model.register_forward_pre_hook(lambda module, args: sharded.announce(), prepend=True)
        model.run_as_forward = lambda compute, *args: compute(model, *args)
        register_fsdp_forward_method(model, "run_as_forward")


@dataclass(frozen=True)
class Facts:
    """What is known of a model since it was whole. digest: the hash of its weights (None: they have changed);
    hard_positions: see probes.py.
    """

    digest: str | None
    hard_positions: bool


class Sharded:
    """The attribute `sharded` of a sharded model.

    skeleton: the model on the meta device; facts: of rank 0's model; origin: the sharded model that it was copied from.
    """

    def __init__(self, sharding: Sharding, skeleton: PreTrainedModel) -> None:
        self.sharding, self.skeleton = sharding, skeleton
        self.facts = Facts(None, False)
        self.origin: PreTrainedModel | None = None
        self.is_running = self.joins = False

    def announce(self) -> None:
        """Tell the other ranks that this one starts a forward pass, if their numbers of passes may differ."""
        if self.joins and not self.is_running:
            self._any_rank_runs(True)

    def run(self, model: Any, compute: Callable[..., Any], *args: Any) -> Any:
        """Call compute(model, ...) with the weights outside of layers gathered, as FSDP does around `forward`."""
        if self.is_running:
            return compute(model, *args)
        self.announce()
        self.is_running = True
        try:
            result = model.run_as_forward(compute, *args)
        finally:
            self.is_running = False
        if not torch.is_grad_enabled() and not self.joins:
            model.reshard()  # FSDP would do so in a backward pass
        return result

    def run_others(self, model: Any) -> None:
        """Take part in the forward passes of other ranks until all have run theirs."""
        device, dtype = self.sharding.device, self.sharding.dtype
        tokens = torch.zeros(1, 1, dtype=torch.long, device=device)
        while self._any_rank_runs(False):
            self.is_running = True
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                model(input_ids=tokens, use_cache=False)
            self.is_running = False
        model.reshard()

    def _any_rank_runs(self, runs: bool) -> bool:
        return bool(all_reduce_max(runs, self.sharding.device))


def sharded_of(model: nn.Module | None) -> Sharded | None:
    """Return the state of a model that is sharded over ranks, None if it is not."""
    return getattr(model, "sharded", None) if isinstance(model, FSDPModule) else None


def is_sharded(model: nn.Module | None) -> bool:
    """Return whether a model is sharded over ranks, so that all ranks have to run each forward pass together."""
    return sharded_of(model) is not None


def one_pass(compute: Compute) -> Compute:
    """Decorate a function that runs one forward pass of the model that is its first argument, which may be sharded."""

    @functools.wraps(compute)
    def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        sharded = sharded_of(model)
        if sharded is None:
            return compute(model, *args, **kwargs)
        return sharded.run(model, functools.partial(compute, **kwargs), *args)

    return run  # type: ignore[return-value]


@contextmanager
def own_passes(model: PreTrainedModel | None) -> Iterator[None]:
    """Let this rank run another number of forward passes than others; at the end it takes part in those left to them.

    All ranks have to enter it. It matters only for a sharded model, without gradients. Before each pass the ranks
    exchange one number. Weights outside of layers stay gathered until its end, on all ranks alike. Inside it no other
    sharded model may run, since other ranks would not take part.
    """
    sharded = sharded_of(model)
    if sharded is None or rank_and_world_size()[1] == 1:
        yield
        return
    sharded.joins = True
    try:
        with torch.no_grad():
            yield
            sharded.run_others(model)
    finally:
        sharded.joins = False


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that a model computes on; offloaded weights are on another."""
    sharded = sharded_of(model)
    return next(model.parameters()).device if sharded is None else sharded.sharding.device


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device; a sharded one is where it has to be."""
    return model if is_sharded(model) else model.to(device)  # type: ignore[arg-type]


def _keep_activations(model: Any) -> None:
    """Let a model whose gathered weights are of 16 bits sum its layers' outputs in float32, as it does under autocast."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())
    for module in model.modules():
        if type(module) is nn.LayerNorm:  # on a CPU it does not mix dtypes
            module.forward = functools.partial(_layer_norm, module)  # type: ignore[assignment]


def _layer_norm(module: nn.LayerNorm, values: Tensor) -> Tensor:
    weight, bias = (None if weight is None else weight.to(values.dtype) for weight in (module.weight, module.bias))
    return F.layer_norm(values, module.normalized_shape, weight, bias, module.eps)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model without its weights: they are on the meta device, buffers are copied."""
    weights = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights)
