"""What ranks tell each other as objects; alone, a process tells itself."""

from __future__ import annotations

from typing import Any

import torch.distributed


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks; all have to call it together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
