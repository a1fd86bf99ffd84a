"""Which command made a run, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def command_of(config: Mapping[str, Any]) -> str:
    """Return the name of the command, as in `python -m dpo_lab.NAME`, that a recorded config is of."""
    keys = {"trained": "evaluate", "reward_model": "reward", "loss": "train"}
    return next((command for key, command in keys.items() if key in config), "sft")
