"""Atomic file writes: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # a full disk, a file size limit or a quota
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a crash leaves the old or the new file. Raise an OSError that names `path`."""
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
    """Yield a temporary path beside `path` for a file or a folder, which is synced and then replaces `path`.

    The caller has to hold a lock on `path`: temporary files that a killed process left beside it are removed.
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
    """Remove the temporary files or folders `.NAME.PID` that a killed process left beside `path`.

    The caller has to hold a lock on `path`, so that no other process is writing it.
    """
    if not path.parent.is_dir():
        return
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+")
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain_disk_error(error: BaseException) -> str | None:
    """Return one line for the user about a full disk or missing permissions; None for any other error.

    Libraries written in Rust give the error number in the message only.
    """
    path = getattr(error, "filename", None)
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    if number in FULL:
        return (
            f"{path or 'a file'}: {os.strerror(number)}; what was written before is intact: make room, then type the"
            " same command again"
        )
    if number in LOCKED and (path or in_text):  # sockets raise these numbers too, without a path
        return (
            f"{path or 'a file'}: {os.strerror(number)}; get permission to read and write there, then type the same"
            " command again"
        )
    return None
