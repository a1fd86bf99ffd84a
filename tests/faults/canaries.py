"""Payloads that would leave a mark if anything ever ran them; a hostile config, checkpoint or model holds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MARK = "CANARY"  # an environment variable: where the mark would be left


def fire(*_: Any, **__: Any) -> None:
    """What a payload calls."""
    Path(os.environ[MARK]).touch()


class Payload:
    """Something that fires when it is unpickled."""

    def __reduce__(self):
        return fire, ()


CODE = f"import os, pathlib\npathlib.Path(os.environ[{MARK!r}]).touch()\n"  # a module that fires when it is imported
SHELL = f"touch ${MARK}"
