"""AdamW with float32 master copies of weights kept in 16 bits, and the share of weights that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from dpo_lab.core.products import copy_each
from dpo_lab.models.sharded_weights import full_tensor

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


class MasterAdamW(AdamW):
    """AdamW whose state holds a float32 master copy of every weight of 16 bits.

    bfloat16 has 8 significant bits, so updates smaller than 1/512 of a weight would be lost in every step. Here updates
    accumulate in the master copy, and after each step the weight is set to the master copy, rounded. Moments are
    float32 too, so the state takes 12 bytes per weight. Weights in float32 are updated in place.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in weights]
            masters = [state.get(MASTER, p) for p, state in zip(weights, states, strict=True)]
            beta1, beta2 = group["betas"]
            adamw(
                masters,
                _in_float32([p.grad for p in weights]),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            copy_each(pair for pair in zip(weights, masters, strict=True) if pair[0] is not pair[1])
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state in float32 as it was saved; torch alone would cast it to the dtype of the weight."""
        super().load_state_dict(dict(state_dict))
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name in (MASTER, *MOMENTS):
                    self.state[weight][name] = value.to(weight.device, torch.float32, copy=True)

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(weight, dtype=torch.float32)
        if is_short(weight) and MASTER not in state:
            state[MASTER] = weight.detach().float()
        return state


def _in_float32(gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients in float32, those of 16 bits copied by one operator."""
    found = [torch.empty_like(g, dtype=torch.float32) if is_short(g) else g for g in gradients]
    copy_each(pair for pair in zip(found, gradients, strict=True) if pair[0] is not pair[1])
    return found


def is_short(tensor: Tensor) -> bool:
    """Return whether a tensor's dtype is a floating-point type of 16 bits or fewer."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def moved_weights(trained: nn.Module, initial: nn.Module) -> dict[str, Any] | None:
    """Return how many trained weights differ from the initial ones, for a model that trains weights of 16 bits, else
    None.

    In float32 no update is lost. Weights that only the trained model has, such as a new head, are not counted. If one
    model is sharded, both are, and it is a collective.
    """
    before = dict(initial.named_parameters())
    trainable = [(name, weight) for name, weight in trained.named_parameters() if weight.requires_grad]
    weights = [(weight, before[name]) for name, weight in trainable if name in before]
    short = [(weight, start) for weight, start in weights if is_short(weight)]
    if not short:
        return None
    moved = sum(int(full_tensor((weight != start.to(weight.device)).sum())) for weight, start in short)
    total = sum(weight.numel() for weight, _ in short)
    return {
        "moved": moved,
        "trained": total,
        "share": moved / total,
        "dtype": str(short[0][0].dtype).removeprefix("torch."),
    }
