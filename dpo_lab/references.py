"""The references for a notebook: every kind of the lab; no Hydra, no Lightning."""

from dpo_lab.models.reference import (
    REFERENCES,
    Cached,
    Frozen,
    FrozenModel,
    Over,
    Reference,
    ReferenceLogps,
    Uniform,
    UniformLogps,
)

__all__ = [
    "REFERENCES",
    "Cached",
    "Frozen",
    "FrozenModel",
    "Over",
    "Reference",
    "ReferenceLogps",
    "Uniform",
    "UniformLogps",
]
