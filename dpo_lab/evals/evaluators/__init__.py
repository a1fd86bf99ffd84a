"""The evaluators: one dataclass each, which is both its settings and its code.

All modules of this folder are imported here.
"""

from dpo_lab.core.registry import import_modules

import_modules(__name__)
