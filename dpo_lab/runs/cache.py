"""Files that are made once: atomically, by one process while others wait, verified by a checksum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dpo_lab.runs.atomic_write import atomic_path

log = logging.getLogger("dpo_lab")

CACHE = Path("outputs/cache")  # shared by all runs
_CHUNK = 1 << 20


def cached(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`; first create it with make(temporary path) if it is missing or its checksum does not match.

    `make` writes a file or a folder at the path it is given. Put a hash of everything that determines the content into
    the name. A mismatch is logged as a warning. Other processes wait for a file lock meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not is_intact(path):
            with atomic_path(path) as beside:
                make(beside)
            write_checksum(path)
    return path


def is_intact(path: Path) -> bool:
    """Return whether `path` matches its checksum. The caller has to hold a lock on it."""
    if not path.exists():
        return False
    try:
        if _checksum_path(path).read_text() == _digest(path):
            return True
    except (OSError, ValueError):
        pass  # the checksum is missing or damaged
    log.warning("%s does not match its checksum: it is created again", path)
    return False


def write_checksum(path: Path) -> None:
    """Write the checksum of `path` beside it."""
    _checksum_path(path).write_text(_digest(path))


def _checksum_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.seal")


def _digest(path: Path) -> str:
    """Return a hash of a file, or of a folder's files with their names; it includes the name of `path` itself."""
    digest = hashlib.blake2b(path.name.encode(), digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"\0{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()
