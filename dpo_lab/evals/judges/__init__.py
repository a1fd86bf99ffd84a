"""The judges, `evals/judge=NAME`: one dataclass each, which is both its settings and its code.

All modules of this folder are imported here, none of which imports torch then, so that a config is checked without it.
"""

from dpo_lab.core.registry import import_modules
from dpo_lab.evals.judges.base import JUDGES, Comparer, Judge, JudgeError, LoadedJudge, Scorer, Verdicts

__all__ = ["JUDGES", "Comparer", "Judge", "JudgeError", "LoadedJudge", "Scorer", "Verdicts"]

import_modules(__name__)
