"""DPO Lab: controlled experiments on Direct Preference Optimization."""

from dpo_lab import losses, references
from dpo_lab.losses import dpo_loss

__version__ = "0.1.0"
__all__ = ["dpo_loss", "losses", "references"]
