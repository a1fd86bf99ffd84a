"""DPO Lab: controlled experiments on Direct Preference Optimization."""

from dpo_lab import plugins
from dpo_lab.core import losses
from dpo_lab.core.functional import dpo_loss
from dpo_lab.models import reference as references
from dpo_lab.plugins import register_callback

__version__ = "0.1.0"
__all__ = ["dpo_loss", "losses", "plugins", "references", "register_callback"]

plugins.load_inherited()
