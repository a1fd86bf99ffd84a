"""The tasks: one class each, which is both its config schema and its code.

All modules of this folder are imported here.
"""

from dpo_lab.core.registry import import_modules

import_modules(__name__)
