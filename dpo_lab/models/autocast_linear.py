"""Linear layers under autocast with fewer casts: weights once a step, and an input once for all layers that share it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dpo_lab.core.products import product
from dpo_lab.models.paths import causal_lm


class LinearCasts:
    """Computes the float32 linear layers of models under autocast, from `install` to `remove`, with few casts.

    Autocast casts every weight in every forward pass, an input for every layer that it enters, and all their gradients.
    Here weights are kept in both dtypes, until `refresh` copies those that the optimizer changed, and an input is cast
    once. Outputs are the same to the bit; so are gradients on the CPU, but biases', which are summed in float32. On a GPU
    gradients are float32 as their products give them. keeps_copies=False: casts weights in every forward pass, for models
    that save memory by checkpointing. LM heads are left out, as core/fused_lm_head.py computes them.
    """

    def __init__(self, models: Iterable[nn.Module], keeps_copies: bool = True) -> None:
        layers = {id(layer): layer for model in models for layer in _layers(model)}
        self.layers, self.keeps_copies = list(layers.values()), keeps_copies
        self.copies: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the id of the weight
        self.last: tuple[weakref.ref[Tensor], int | None, torch.dtype] | None = None  # the last input that was cast
        self.last_cast: Tensor | None = None

    def install(self) -> LinearCasts:
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)
        return self

    def remove(self) -> None:
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        self.copies.clear()
        self.last = self.last_cast = None

    @torch.no_grad()
    def refresh(self, is_trained: bool = True) -> None:
        """Copy the weights that an optimizer step has changed: those that are trained, or the others."""
        changed = [pair for pair in self.copies.values() if pair[0].requires_grad == is_trained]
        if changed:
            weights, copies = zip(*changed, strict=True)
            torch._foreach_copy_(copies, weights)

    def _forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        device, weight, bias = x.device.type, layer.weight, layer.bias
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if (
            x.ndim < 2
            or dtype.itemsize > 2
            or x.dtype not in (dtype, torch.float32)
            or weight.dtype is not torch.float32
        ):
            return F.linear(x, weight, bias)
        casts = self._cast(x, dtype), self._copy(weight, dtype), None if bias is None else self._copy(bias, dtype)
        if not torch.is_grad_enabled():
            return F.linear(*casts)
        return _Linear.apply(x, weight, bias, *casts)  # type: ignore[return-value]

    def _copy(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        if not self.keeps_copies:
            return weight.detach().to(dtype)
        _, copy = self.copies.get(id(weight), (weight, None))
        if copy is None or copy.dtype is not dtype or copy.device != weight.device:
            with torch.inference_mode(False):  # a validation may be the first to need it, a backward pass the next
                copy = weight.detach().to(dtype)
            self.copies[id(weight)] = weight, copy
        return copy

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        if x.dtype is dtype:
            return x.detach()
        version = None if x.is_inference() else x._version
        if self.last is None or self.last[0]() is not x or self.last[1:] != (version, dtype):
            self.last, self.last_cast = (weakref.ref(x), version, dtype), x.detach().to(dtype)
        return self.last_cast


def _layers(model: nn.Module) -> list[nn.Linear]:
    head = causal_lm(model).get_output_embeddings()
    return [layer for layer in model.modules() if type(layer) is nn.Linear and layer is not head]


class _Linear(torch.autograd.Function):
    """A linear layer; takes the float32 tensors that gradients are for and the casts that it computes with."""

    @staticmethod
    def forward(ctx, x, weight, bias, x_cast, weight_cast, bias_cast):
        ctx.save_for_backward(x_cast, weight_cast)
        ctx.dtypes = x.dtype, weight.dtype
        return F.linear(x_cast, weight_cast, bias_cast)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), (x_dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        of_x = product(rows, weight, x_dtype).view(x.shape) if needs_x else None
        of_weight = product(rows.T, x.flatten(0, -2), weight_dtype) if needs_weight else None
        return of_x, of_weight, rows.sum(0, dtype=weight_dtype) if needs_bias else None, None, None, None
