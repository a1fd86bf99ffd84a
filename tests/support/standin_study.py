"""The command of studies over the stand-in command's runs."""

from __future__ import annotations

import sys

from dpo_lab import study
from tests.support.standin import main

if __name__ == "__main__":
    sys.exit(study.main(task=main))
