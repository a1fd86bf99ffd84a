"""A GPU that is not there: tensors that say they are on cuda:0 and compute on the CPU, and errors where devices would clash.

FakeTensorMode holds no numbers, so it stops at the first `.item()`, and torch's CPU build can't go backward through its cuda
tensors. A `CudaTensor` has numbers: whatever a run does can be done with it, and comes out as on the CPU. It tells nothing of
CUDA's kernels, streams and memory. Use it in a process of its own, for it replaces parts of torch.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # every optimizer imports it, and it takes stock of torch: before any of it is replaced
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch._C._distributed_c10d import FakeWork
from torch.distributed import distributed_c10d
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tests.support.varlen  # noqa: F401  # the attention kernel of a GPU, on the CPU

DEVICE, CPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.device("cpu")
aten = torch.ops.aten
TAKES_BOTH = {aten._to_copy.default, aten.copy_.default}  # these carry numbers from one device to the other
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
READ = {  # by the host, which waits for them: a number, or how many there are of something
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default),
}
WAITS: list[str] = []  # what made the host wait for the GPU, with the place in our code
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


IN_FLOAT32 = torch.library.Library(
    "aten", "IMPL"
)  # products of 16 bits with sums of 32, which torch has for GPUs alone
IN_FLOAT32.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), "CPU")
IN_FLOAT32.impl(
    "addmm.dtype_out",
    lambda to, left, right, dtype, beta=1, out=None: to.addmm_(left.to(dtype), right.to(dtype), beta=beta),  # in place
    "CPU",
)
PINNED: dict[int, torch.Tensor] = {}  # by address


class DevicesDiffer(RuntimeError):
    """An operation got tensors of both devices, which CUDA refuses."""


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0 as far as Python can see; its numbers are in `inner`, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CudaTensor:
        shape = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        with torch.inference_mode(inner.is_inference()):  # a view is what its base is
            made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device="cpu", **shape)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        if kwargs.pop("copy", False):
            return self.clone().to(*args, **kwargs)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        moves = device is not None and device.type != "cuda"
        made = self if dtype in (None, self.dtype) else aten._to_copy.default(self, dtype=dtype)
        return _ToCpu.apply(made) if moves else made  # type: ignore[return-value]

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.to(CPU)

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def tolist(self) -> Any:
        note_wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made = CudaTensor(self.inner.detach().clone())
            made = torch.nn.Parameter(made) if isinstance(self, torch.nn.Parameter) else made
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:  # a checkpoint is read onto the CPU
        return self.inner.detach().__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"CudaTensor({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so that Module.to swaps parameters, and keeps ties
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> CudaTensor:
        return CudaTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _ToCpu(torch.autograd.Function):
    """`tensor.cpu()`: apart from aten._to_copy, by which autograd also casts, to the device that C++ sees."""

    @staticmethod
    def forward(ctx: Any, tensor: CudaTensor) -> torch.Tensor:
        note_wait("copied to the CPU")
        return tensor.inner.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad.to(DEVICE)


class PretendCuda(TorchDispatchMode):
    """Makes what is asked for on cuda a CudaTensor, and notes the products of plain CPU tensors in `cpu_products`."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_products = 0
        self.autocast = False  # whether CUDA's is on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):  # inference mode hands these on as they are
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in PRODUCTS and not any(isinstance(value, CudaTensor) for value in tensors_of(args)):
            self.cpu_products += 1
            if self.autocast:
                raise DevicesDiffer(
                    f"{func}: under CUDA's autocast a product of CPU tensors is computed in full precision"
                )
        return compute(func, args, kwargs or {})


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs) on the CPU, its results on the device that CUDA would leave them on."""
    if func.namespace == "c10d":
        return collective(func, args)
    if func in (aten.is_pinned.default, aten._pin_memory.default):
        return pinned(args[0]) if func is aten._pin_memory.default else False
    tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
    check_devices(func, args, tensors)
    if makes_wait(func, args, kwargs, tensors):
        note_wait(func.name())
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    first = args[0] if args else None
    on_cuda = any(isinstance(value, CudaTensor) for value in tensors)  # C++ gives new_zeros and the like the CPU's name
    if device is not None and not on_cuda:
        on_cuda = device.type == "cuda"
    if device is not None and device.type == "cuda":
        kwargs = kwargs | {"device": CPU}
    if kwargs.get("pin_memory"):  # torch's CPU build has no allocator of pinned memory
        kwargs = kwargs | {"pin_memory": False}
    result = func(*inner_of(args), **{name: inner_of(value) for name, value in kwargs.items()})
    if any(returned.alias_info is not None and returned.alias_info.is_write for returned in func._schema.returns):
        return kwargs.get("out", first)
    if isinstance(result, torch.Tensor):
        return CudaTensor(result) if on_cuda else result
    return tree_map_only(torch.Tensor, CudaTensor, result) if on_cuda else result


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    PINNED[copy.data_ptr()] = copy
    return copy


def collective(func: Any, args: Any) -> Any:
    """A collective over a group that, like NCCL's, serves GPUs alone."""
    tensors = [*tensors_of(args)]
    if func.name() != "c10d::barrier" and not all(isinstance(value, CudaTensor) for value in tensors):
        raise DevicesDiffer(f"{func}: No backend type associated with device type cpu")
    inner = inner_of(args)
    if distributed.get_backend() == "gloo":
        return func(*inner)
    assert distributed.get_backend_config() == "cuda:fake"  # as torch's own: every rank says what this one says
    if "allgather_" in func.name():
        outputs, inputs = inner[0], inner[1]
        for output in outputs[0]:
            output.copy_(inputs[0])
        return outputs, FakeWork().boxed()
    return (inner[0], FakeWork().boxed())


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def inner_of(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(inner_of(each) for each in value)
    return value.inner if isinstance(value, CudaTensor) else value


def makes_wait(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    """Whether the host would wait for the GPU: to read from it, or to copy from memory that is not pinned."""
    of_gpu = [isinstance(value, CudaTensor) for value in tensors]
    if func in TAKES_BOTH:
        target = kwargs.get("device")
        to_gpu = of_gpu[0] if func is aten.copy_.default else target is not None and torch.device(target).type == "cuda"
        non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        return to_gpu and not of_gpu[-1] and not (non_blocking and tensors[-1].data_ptr() in PINNED)
    if not any(of_gpu):
        return False
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in INDEXES:  # where a mask is true is counted, indices of the CPU are copied
        return any(value is not None and (value.dtype is torch.bool or value.is_cpu) for value in args[1])
    return func in READ


def note_wait(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "dpo_lab" in frame.filename]
    WAITS.append(what + "".join(f", {Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-1:]))


def check_devices(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise DevicesDiffer where CUDA would: a scalar of the CPU may meet tensors of the GPU, element by element."""
    if func in TAKES_BOTH:
        return
    plain = [value for value in tensors if not isinstance(value, CudaTensor)]
    if not plain or len(plain) == len(tensors):
        return
    scalars = all(value.ndim == 0 for value in plain)
    if scalars and (torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor):
        return
    if func in INDEXES and isinstance(args[0], CudaTensor) and all(v.dtype in (torch.long, torch.bool) for v in plain):
        return  # CUDA moves indices by itself
    raise DevicesDiffer(f"{func}: {[(str(value.device), tuple(value.shape)) for value in tensors]}")


@contextmanager
def pretend_cuda(devices: int = 1) -> Iterator[PretendCuda]:
    """Inside it one GPU (or more) is there, not initialised yet; its memory can't be asked for before it is."""
    state, mode = {"initialised": False}, PretendCuda()

    def initialise(*_: Any) -> None:
        state["initialised"] = True

    def allocated(*_: Any) -> int:
        if not state["initialised"]:
            raise RuntimeError("Invalid device argument: CUDA was not initialised")
        return 7 << 20

    of_cuda = dict(
        is_available=lambda: True,
        device_count=lambda: devices,
        current_device=lambda: DEVICE.index,
        is_initialized=lambda: state["initialised"],
        _lazy_init=initialise,
        set_device=initialise,
        is_bf16_supported=lambda *_, **__: True,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: SimpleNamespace(total_memory=80 << 30),
        get_device_name=lambda *_: "pretended",
        reset_peak_memory_stats=allocated,
        memory_allocated=allocated,
        max_memory_allocated=allocated,
        memory_reserved=allocated,
        mem_get_info=lambda *_: (80 << 30, 80 << 30),
        empty_cache=lambda: None,
        synchronize=lambda *_: None,
        manual_seed_all=lambda *_: None,
        get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=lambda *_: None,
    )
    names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")
    real = {name: getattr(torch, name) for name in names}

    def of_either(name: str) -> Any:  # C++ takes a CudaTensor for one of the CPU, so its autocast is the CPU's
        def call(device: str = "cuda", *values: Any) -> Any:
            if name == "set_autocast_enabled" and device == "cuda":
                mode.autocast = values[0]
            return real[name]("cpu" if device == "cuda" else device, *values)

        return call

    made = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}

    def then_moved(name: str) -> Any:  # C++ would look for CUDA before it asks the mode
        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            found = made[name](*args, **kwargs)
            return found if device is None else found.to(device)

        return make

    _device_constructors()  # `with torch.device(...)` knows torch.tensor by its identity, from its first use on
    of_torch = {name: of_either(name) for name in names} | {name: then_moved(name) for name in made}
    join = distributed.init_process_group

    def join_by_gloo(backend: str = "nccl", device_id: Any = None, **kwargs: Any) -> None:
        join("gloo" if backend == "nccl" else backend, **kwargs)

    group = clip_grad._group_tensors_by_device_and_dtype

    def by_device(lists: Any, *args: Any) -> Any:  # C++ would say that they are the CPU's
        on_gpu = isinstance(lists[0][0], CudaTensor)
        return {(DEVICE if on_gpu else key[0], key[1]): found for key, found in group(lists, *args).items()}

    foreach = patch.object(clip_grad, "_has_foreach_support", lambda *_: True)
    clips, steps = (patch.object(each, group.__name__, by_device) for each in (clip_grad, optimizer))
    of_ranks = patch.object(distributed_c10d, "_get_object_coll_device", lambda group=None: DEVICE)  # as for NCCL
    joined = patch.object(distributed, "init_process_group", join_by_gloo)
    unwrapped = patch.object(DDPStrategy, "configure_ddp", lambda self: None)  # torch's C++ would look for CUDA
    with (
        foreach,
        clips,
        steps,
        of_ranks,
        joined,
        unwrapped,
        patch.multiple(torch.cuda, **of_cuda),
        patch.multiple(torch, **of_torch),
        mode,
    ):
        swapped, cudnn = (
            torch.__future__.get_swap_module_params_on_conversion(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter that moves stays the object it is
        try:
            yield mode
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
