"""Atomic file writes: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # a disk, or what of it a user may have
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomic(path: Path, text: str) -> None:
    """Put `text` at `path`, of which nobody ever sees a part, whatever dies meanwhile. An OSError names `path`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder at, which then takes the place of what is there, durable.

    The caller holds the place: what a process that was killed meanwhile left beside it is removed.
    """
    remove_leftovers(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        for each in (beside, *beside.rglob("*")):
            sync(each)
        remove(path)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        remove(beside)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it made `path` left beside it, `.NAME.PID`, a file or a folder.

    The caller holds the place: nobody makes it now.
    """
    if not path.parent.is_dir():
        return
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+")
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where neither is."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Let a file's bytes, or a folder's names, be on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain_disk_error(error: BaseException) -> str | None:
    """What to say, in one line, of a file that could not be written; None of anything else.

    Libraries in Rust tell the system's number in their words alone.
    """
    path = getattr(error, "filename", None)
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if number in FULL:
        return (
            f"{path or 'a file'}: {os.strerror(number)}; what was written before is intact: make room, then type the same"
            " command again"
        )
    if number in LOCKED and (path or said):  # a socket knows such numbers, too
        return (
            f"{path or 'a file'}: {os.strerror(number)}; see to it that you may read and write there, then type the same"
            " command again"
        )
    return None
