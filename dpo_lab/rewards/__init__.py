"""Sources of rewards for training on fresh responses, `reward=NAME`: one small dataclass each.

All modules of this folder are imported here, none of which imports torch then, so that a config is checked without it.
"""

from dpo_lab.core.registry import import_modules
from dpo_lab.rewards.base import REWARDS, Reward, RewardError, RewardFunction, RewardInputs, Scale

__all__ = ["REWARDS", "Reward", "RewardError", "RewardFunction", "RewardInputs", "Scale"]

import_modules(__name__)
