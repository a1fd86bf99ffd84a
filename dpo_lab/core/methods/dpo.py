"""Direct preference optimization: `loss=` on given pairs."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.core.methods.base import Method


@dataclass
class DPO(Method, name="dpo", uses_loss=True):
    """Trains with a loss of pairs on the pairs of `data=`, without a sample. Rafailov et al. 2023 (arXiv:2305.18290)."""
