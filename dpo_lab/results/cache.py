"""Files made once: whole or not at all, by one process while others wait, made anew when they are not what they should be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

CACHE = Path("outputs/cache")  # what all runs share


def once(path: Path, make: Callable[[Path], None], is_valid: Callable[[Path], bool] = lambda path: True) -> Path:
    """`path`, made by make(beside) if it is absent or not valid. make writes a file or a folder at the place it is given.

    A name that holds a hash of all that went into the content is what makes such a path a cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists() or not is_valid(path):
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                make(beside)
                _remove(path)
                os.replace(beside, path)
            finally:
                _remove(beside)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
