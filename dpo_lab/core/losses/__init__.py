"""The losses: one small dataclass each, which is both its config schema and its formula.

A loss takes the `PairLogps` of policy and reference and returns one loss per pair, [B]. In formulas h is the log-ratio
margin (log pi - log ref)(chosen) - (log pi - log ref)(rejected), w chosen, l rejected, and sigma the logistic function.

All modules of this folder are imported here, none of which imports torch then, so that a config is checked without it.
A class that they define is in LOSSES by its name in configs, and here by its own name.
"""

from dpo_lab.core.losses.base import LOSSES, Loss
from dpo_lab.core.pairs import PairLogps
from dpo_lab.core.registry import import_modules

__all__ = ["LOSSES", "Loss", "PairLogps"]

import_modules(__name__)
globals().update({loss.__name__: loss for loss in LOSSES.values()})
