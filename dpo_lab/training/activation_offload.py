"""Offload activations: what autograd keeps of the forward pass waits in the host's memory for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu


def offload_activations(body: nn.Module) -> None:
    """Let each forward pass of `body`, a model without its LM head, keep what grows with its tokens on the CPU.

    Under gradient checkpointing these are the inputs of layers. Values are copied, so gradients are the same bits.
    """
    in_progress: list[_SaveOnCPU] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        in_progress.append(_SaveOnCPU(module, {ids.numel(), ids.shape[-1]}))
        in_progress[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        in_progress.pop().__exit__()

    body.register_forward_pre_hook(enter, with_kwargs=True)
    body.register_forward_hook(leave, always_call=True)


class _SaveOnCPU(save_on_cpu):
    """torch's save_on_cpu for tensors with a dimension in `sizes`, the numbers of tokens.

    Weights, and autocast's copies of them, stay: they would be moved in each micro-batch, and take no less memory.
    """

    def __init__(self, body: nn.Module, sizes: set[int]) -> None:
        super().__init__(pin_memory=True)
        weights = {p.untyped_storage().data_ptr() for p in body.parameters()}
        move = self.pack_hook

        def pack(tensor: Tensor) -> Any:
            stays = not sizes & {*tensor.shape} or tensor.untyped_storage().data_ptr() in weights
            return (tensor.device, tensor) if stays else move(tensor)

        self.pack_hook = pack
