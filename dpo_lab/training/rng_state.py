"""The state of a rank besides weights: its random generators, and its metrics since they were last logged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from dpo_lab.core.seeds import derive_seed


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random generators as plain values, the GPU's included if the rank uses one."""
    _, words, at, has_gauss, gauss = np.random.get_state(legacy=True)
    version, state, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [words.tolist(), at, has_gauss, gauss],  # type: ignore[union-attr]
        "python": [version, list(state), next_gauss],
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state from random_state. Raises KeyError if one is missing."""
    words, at, has_gauss, gauss = state["numpy"]
    version, python, next_gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", np.array(words, np.uint32), at, has_gauss, gauss))
    random.setstate((version, tuple(python), next_gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_random(seed: int, rank: int) -> None:
    """Seed the generators of a rank whose state is not in the checkpoint."""
    rank_seed = derive_seed(seed, f"rank/{rank}")
    torch.manual_seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    random.seed(rank_seed)


def metric_state(metric: Metric) -> dict[str, Any]:
    """Return the state of a metric since its last reset, of this rank only."""
    values = {name: getattr(metric, name).detach().cpu() for name in metric._defaults}
    return {"updates": metric.update_count, "values": values}


def set_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Set a metric to a state from metric_state."""
    metric.reset()
    for name, value in state["values"].items():
        setattr(metric, name, value.to(metric.device))
    metric._update_count = state["updates"]


def sum_metric_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum the metric states of several ranks: all states of the training metrics are sums."""
    names = states[0]["values"]
    return {
        "updates": sum(state["updates"] for state in states),
        "values": {name: torch.stack([state["values"][name] for state in states]).sum(0) for name in names},
    }
