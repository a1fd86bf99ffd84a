"""Losses by name, with the settings that a loss has no default for."""

from __future__ import annotations

from typing import Any

from dpo_lab.core.losses import LOSSES, Loss
from dpo_lab.core.losses.base import StepLevel

REQUIRED: dict[str, dict[str, Any]] = {"mix": {"terms": {"dpo": 0.7, "bco": 0.3}}}
STEP_LEVEL = [name for name, loss in LOSSES.items() if issubclass(loss, StepLevel)]
OF_PAIRS = [name for name in LOSSES if name not in STEP_LEVEL]


def make_loss(name: str, **settings: Any) -> Loss:
    return LOSSES[name](**(REQUIRED.get(name, {}) | settings))
