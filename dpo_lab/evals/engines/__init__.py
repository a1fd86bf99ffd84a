"""The generation engines, `evals/engine=NAME`: one dataclass each, which is both its settings and its code.

All modules of this folder are imported here, none of which imports torch then, so that a config is checked without it.
"""

from dpo_lab.core.registry import import_modules
from dpo_lab.evals.engines.base import ENGINES, Engine, EngineError, Request

__all__ = ["ENGINES", "Engine", "EngineError", "Request"]

import_modules(__name__)
