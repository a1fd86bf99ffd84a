"""Shapes checked in tests: functions with jaxtyping annotations check their arguments and results when they are called."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np
import torch
from beartype import beartype

from dpo_lab.core import losses

# Lowest first: each is imported, and its functions replaced, before a later one imports them.
MODULES = (
    "core.pairs",
    "core.logps",
    "core.rollouts",
    "core.advantages",
    "core.methods.base",
    "core.methods.online_dpo",
    "core.methods.ppo",
    "core.products",
    "core.lm_head",
    "core.fused_lm_head",
    "core.linear_loss",
    *(f"core.losses.{module.name}" for module in iter_modules(losses.__path__)),  # its base is the first by name
    "core.metrics",
    "core.bradley_terry",
    "core.functional",
    "models.forward",
    "models.critic",
    "models.reward_head",
    "models.sampling",
)
SHAPE = re.compile(r"\b(Float|Float64|Int|Bool|Num)\[(Tensor|np\.ndarray), ")


def check_shapes() -> int:
    """Replace every function and dataclass with shapes in MODULES by one that checks them; return their number."""
    count = 0
    for name in MODULES:
        module = importlib.import_module(f"dpo_lab.{name}")
        for owner, key, member in _members(module):
            if (checked := _checked(member, module)) is not None:
                setattr(owner, key, checked)
                count += 1
    return count


def _members(module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    for key, member in list(vars(module).items()):
        if getattr(member, "__module__", None) == module.__name__:
            yield module, key, member
            if inspect.isclass(member):
                yield from ((member, name, of_class) for name, of_class in list(vars(member).items()))


def _checked(member: Any, module: ModuleType) -> Any:
    """Return the function, class method or property with checks, None if it states no shapes."""
    if isinstance(member, classmethod):
        function = _checked(member.__func__, module)
        return None if function is None else classmethod(function)
    if isinstance(member, property):
        function = _checked(member.fget, module)
        return None if function is None else property(function)
    if not inspect.isfunction(member):
        return None
    stated = {name: hint for name, hint in member.__annotations__.items() if SHAPE.search(str(hint))}
    if not stated:
        return None
    return _with_checks(member, {name: _resolve(hint, module) for name, hint in stated.items()})


def _resolve(hint: str, module: ModuleType) -> Any:
    return eval(hint, vars(jaxtyping) | vars(module) | {"Tensor": torch.Tensor, "np": np})


def _with_checks(function: Callable, hints: dict[str, Any]) -> Callable:
    function.__annotations__ = hints  # the others are pyright's to check
    return jaxtyping.jaxtyped(function, typechecker=beartype)
