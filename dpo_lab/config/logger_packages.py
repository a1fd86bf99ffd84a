"""Loggers that need an extra package: which one, and what to type where it is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

# Lightning's class: the module that it needs, which is also the name of the extra of this package.
NEEDED = {"lightning.pytorch.loggers.WandbLogger": "wandb", "lightning.pytorch.loggers.MLFlowLogger": "mlflow"}


def check_packages(loggers: Mapping[str, Any]) -> None:
    """Raise ValueError if the config names a logger whose package is not installed."""
    for key, node in loggers.items():
        needed = NEEDED.get(node.get("_target_", ""))
        if needed is not None and find_spec(needed) is None:
            raise ValueError(f"logger={key}: its package is not installed; type pip install 'dpo_lab[{needed}]'")
