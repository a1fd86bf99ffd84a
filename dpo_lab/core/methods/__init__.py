"""The methods: how a policy learns from preferences, one small dataclass each, which is both its config schema and its
formula.

All modules of this folder are imported here, none of which imports torch then, so that a config is checked without it.
A class that they define is in METHODS by its name in configs.
"""

from dpo_lab.core.methods.base import METHODS, Method, Online, PolicyGradient
from dpo_lab.core.registry import import_modules

__all__ = ["METHODS", "Method", "Online", "PolicyGradient"]

import_modules(__name__)
