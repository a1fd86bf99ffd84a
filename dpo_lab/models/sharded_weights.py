"""The weights of a sharded model: scattered from rank 0, copied, kept on disk, gathered, and loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpo_lab.distributed.collectives import broadcast_object, rank_and_world_size
from dpo_lab.models.sharding import Facts, Sharded, Sharding, on_meta, sharded_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_rank_zero(sharding: Sharding, whole: PreTrainedModel | None, facts: Facts | None) -> PreTrainedModel:
    """Return rank 0's model sharded, as it is with adapters, tied weights, buffers and attributes; a collective.

    whole: the model in the memory of rank 0's host, which is freed weight by weight; facts: of it. Both are None on
    other ranks, which get the model's modules without weights.
    """
    skeleton, known = broadcast_object((None if whole is None else on_meta(whole), facts))
    assert skeleton is not None
    assert known is not None
    model = _with_weights(sharding, skeleton, _scattered_from(sharding, whole))
    _state(model).facts = known
    return model


@torch.no_grad()
def sharded_copy(model: PreTrainedModel, added: Mapping[str, nn.Module] | None = None) -> PreTrainedModel:
    """Copy the trainable weights of a sharded model; frozen ones are shared.

    added: modules that become attributes of the copy by these names; their weights are 0.
    """
    return _copy(model, _state(model).sharding, lambda weight: weight.requires_grad, added)


def gathered_as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """Return a sharded model with the same weights that gathers them in their own dtype, for passes without autocast."""
    sharding = _state(model).sharding
    return model if sharding.dtype is None else _copy(model, replace(sharding, dtype=None), lambda weight: False)


@contextmanager
def kept_on_disk(model: PreTrainedModel) -> Iterator[None]:
    """Keep the trainable weights of a sharded model in a temporary file of each rank, and not in memory."""
    sharded = sharded_of(model)
    if sharded is None or sharded.sharding.offload:
        yield
        return
    with tempfile.TemporaryFile() as file:
        shards = [_local(weight) for weight in model.parameters() if weight.requires_grad]
        sizes = [shard.untyped_storage().nbytes() for shard in shards]
        for shard in shards:
            copied = shard.to("cpu", copy=True)  # a storage that numpy has seen can not be resized
            copied.flatten().view(torch.uint8).numpy().tofile(file)
            shard.untyped_storage().resize_(0)
        yield
        file.seek(0)
        for shard, size in zip(shards, sizes, strict=True):
            shard.untyped_storage().resize_(size)
            read = torch.from_numpy(np.fromfile(file, np.uint8, shard.numel() * shard.element_size()))
            shard.copy_(read.view(shard.dtype).view(shard.shape))


@torch.no_grad()
def gather_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model unsharded, in the memory of rank 0's host, and None on other ranks; a collective.

    A model that is not sharded is returned as it is, on all ranks.
    """
    sharded = sharded_of(model)
    if sharded is None:
        return model
    is_first = rank_and_world_size()[0] == 0
    weights = {}
    for name, weight in model.named_parameters():
        full = full_tensor(weight)
        if is_first:
            weights[name] = full.cpu()
    if not is_first:
        return None
    whole = copy.deepcopy(sharded.skeleton)
    _set_weights(whole, lambda name, meta: nn.Parameter(weights[name], meta.requires_grad))
    return whole.eval()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a weight sharded by FSDP, a collective of all ranks; otherwise the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Any, sharded: Any) -> Any:
    """Shard a tensor that every rank has as `sharded` is; return values that are not a tensor of its shape unchanged."""
    if not isinstance(sharded, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != sharded.shape:
        return tensor
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    own = tensor[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return _dtensor(own.to(_local(sharded).device, copy=True).contiguous(), sharded)


def load_full(module: nn.Module, full: Mapping[str, Any], strict: bool = True) -> None:
    """Load full tensors, which every rank has, into a module whose weights may be sharded."""
    shards = module.state_dict()
    module.load_state_dict({name: shard_like(value, shards.get(name)) for name, value in full.items()}, strict=strict)


def set_digest(model: nn.Module, digest: str | None) -> None:
    """Set the known hash of the weights of a sharded model, None while they change."""
    if (sharded := sharded_of(model)) is not None:
        sharded.facts = replace(sharded.facts, digest=digest)


def _with_weights(
    sharding: Sharding, skeleton: PreTrainedModel, weight_of: Callable[[str, Any], Any]
) -> PreTrainedModel:
    """Return a sharded copy of a model on the meta device with the weights weight_of(name, meta weight)."""
    model = copy.deepcopy(skeleton)
    sharding.shard(model)
    _set_weights(model, weight_of)  # FSDP looks at them again before the first forward pass
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(sharding.device)
    return model


def _set_weights(model: nn.Module, weight_of: Callable[[str, Any], Any]) -> None:
    """Replace each weight by weight_of(name, weight), a tied one by the same for all its names."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in made:
                    made[weight] = weight_of(f"{prefix}.{name}" if prefix else name, weight)
                module._parameters[name] = made[weight]


def _scattered_from(sharding: Sharding, whole: PreTrainedModel | None) -> Callable[[str, DTensor], nn.Parameter]:
    """Return a function that scatters a weight of rank 0's model, and frees it there."""
    weights = {} if whole is None else dict(whole.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def scattered(name: str, meta: DTensor) -> nn.Parameter:
        full = torch.empty(meta.shape, dtype=meta.dtype, device=sharding.device)
        if weights:
            full.copy_(weights[name])
            weights[name].data = full.new_empty(0, device="cpu")
        local = distribute_tensor(full, meta.device_mesh, meta.placements).to_local()
        # copied, since the shard may be a view of the full tensor
        return _parameter(local.to("cpu" if sharding.offload else sharding.device, copy=True), meta)

    return scattered


def _copy(
    model: PreTrainedModel,
    sharding: Sharding,
    is_copied: Callable[[nn.Parameter], bool],
    added: Mapping[str, nn.Module] | None = None,
) -> PreTrainedModel:
    weights, original = dict(model.named_parameters(remove_duplicate=False)), _state(model)
    skeleton = copy.deepcopy(original.skeleton)
    for name, module in (added or {}).items():
        setattr(skeleton, name, module.to("meta"))
    device = _local(next(iter(weights.values()))).device

    def weight_of(name: str, meta: DTensor) -> Any:
        if name not in weights:
            return _parameter(torch.zeros_like(meta.to_local(), device=device), meta)
        weight: Any = weights[name]
        return _parameter(_local(weight).clone(), meta) if is_copied(weight) else weight

    copied = _with_weights(sharding, skeleton, weight_of)
    _state(copied).facts, _state(copied).origin = original.facts, model
    return copied


def _state(model: PreTrainedModel) -> Sharded:
    sharded = sharded_of(model)
    assert sharded is not None
    return sharded


def _dtensor(local: Tensor, like: DTensor) -> DTensor:
    """Return a sharded tensor laid out as `like`, whose part on this rank is `local`, which may lie on the host."""
    layout: dict[str, Any] = dict(shape=like.shape, stride=like.stride(), run_check=False)
    made = DTensor.from_local(local, like.device_mesh, like.placements, **layout)
    made._local_tensor = local  # from_local has moved it to the device of the mesh
    return made


def _parameter(local: Tensor, like: DTensor) -> nn.Parameter:
    return nn.Parameter(_dtensor(local, like), requires_grad=like.requires_grad)


def _local(weight: Any) -> Tensor:
    """Return this rank's shard, which shares memory with the weight."""
    return weight.to_local().detach()
