"""Files that are made once: atomically, by one process while others wait, verified by a checksum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dpo_lab.runs.atomic_write import atomic_path

log = logging.getLogger("dpo_lab")

CACHE = Path("outputs/cache")  # what all runs share
_CHUNK = 1 << 20


def cached(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by make(beside) if it is absent or holds another byte than was put there; the latter is said.

    make writes a file or a folder at the place it is given. A name that holds a hash of all that went into the content is
    what makes such a path a cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not is_intact(path):
            with atomic_path(path) as beside:
                make(beside)
            write_checksum(path)
    return path


def is_intact(path: Path) -> bool:
    """Whether what is at `path` is, byte for byte, what was sealed there. The caller holds it."""
    if not path.exists():
        return False
    try:
        if _seal_of(path).read_text() == _digest(path):
            return True
    except (OSError, ValueError):
        pass  # it was never sealed, or its seal is damaged as well
    log.warning("%s does not hold what was put there: making it anew", path)
    return False


def write_checksum(path: Path) -> None:
    """Let what is at `path` be known as whole from now on."""
    _seal_of(path).write_text(_digest(path))


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.seal")


def _digest(path: Path) -> str:
    """A hash of a file, or of a folder's files with their names; and of its own name, so that nothing passes for another."""
    digest = hashlib.blake2b(path.name.encode(), digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"\0{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()
