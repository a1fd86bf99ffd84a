"""Checkpoint files that verify themselves: written beside their place, synced, then renamed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dpo_lab.errors import first_line
from dpo_lab.runs.atomic_write import sync
from dpo_lab.runs.run_record import RunFailed

log = logging.getLogger("dpo_lab")

_NAME = re.compile(r"step=(\d+)\.ckpt")
_LEFTOVER = re.compile(r"\..+\.ckpt\.\d+\.tmp")
_DIGEST = 32  # bytes
_MARK = b"blake2b:"
_TRAILER = 2 + len(_MARK) + 2 * _DIGEST  # bytes: the length of a zip archive's comment, and the comment
_CHUNK = 1 << 20


class CheckpointError(RunFailed):
    """Raised where a checkpoint can't be written or resumed from; the message names the file and says what to type."""


class VerifiedCheckpointIO(CheckpointIO):
    """Checkpoint files with their checksum in the comment of the zip archive, readable by torch.load, mapped or not.

    A file is streamed to a temporary file in the same folder, without a copy in memory or on another file system, and
    then renamed; a crash at any point leaves the old file or the new one. maps: load files memory-mapped, so that only
    those parts of tensors are read that are used.
    """

    def __init__(self, maps: bool = False) -> None:
        self.maps = maps

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raise CheckpointError if that fails, and leave an earlier file at `path` as it was."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
                sync(path.parent.parent)
            with temporary.open("w+b") as file:
                _write(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except OSError as error:
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror}); earlier checkpoints are intact: free disk space, then"
                " type the same command again, which resumes from the newest"
            ) from error
        finally:
            with suppress(OSError):  # after a rename it does not exist
                temporary.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify the checksum and load plain values and tensors; nothing in the file is executed.

        Raises CheckpointError if the file is damaged or holds other objects.
        """
        if reason := damage(Path(path)):
            raise CheckpointError(f"{path}: {reason}; delete it, and the same command resumes from the one before")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=self.maps)
        except (UnpicklingError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: holds more than plain values and is not read ({first_line(error)})"
            ) from None

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class _HashingWriter:
    """A writer for torch.save that computes a checksum and keeps the OSError of a failed write in `error`.

    torch.save replaces an error in `write` by its own, without the message of the operating system.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.blake2b(digest_size=_DIGEST)
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: Mapping[str, Any], file: IO[bytes]) -> None:
    writer = _HashingWriter(file)
    try:
        torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it only calls `write` and `flush`
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise
    file.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment, which is 0 so far
    file.write(_trailer(writer.digest.hexdigest()))


def _trailer(hexdigest: str) -> bytes:
    comment = _MARK + hexdigest.encode()
    return len(comment).to_bytes(2, "little") + comment


def damage(path: Path) -> str | None:
    """Return why a file is not an intact checkpoint, or None if its checksum matches."""
    left = path.stat().st_size - _TRAILER
    digest = hashlib.blake2b(digest_size=_DIGEST)
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(b"\0\0")  # the length of the comment when the checksum was computed
        if left < 0 or file.read() != _trailer(digest.hexdigest()):
            return "damaged, its checksum does not match"
    return None


def by_step(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder, intact or not, by number of optimizer steps; the newest last."""
    if not folder.is_dir():
        return {}
    matches = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match and path.is_file()))


def step_of(path: Path) -> int:
    """Return the number of optimizer steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a folder, None if it has no checkpoint; skip damaged ones with a warning.

    Raises CheckpointError if all are damaged, since only the user may decide to train from the start.
    """
    checkpoints = by_step(folder)
    for path in reversed(checkpoints.values()):
        if (reason := damage(path)) is None:
            return path
        log.warning("%s: %s; skipped, using the one before", path, reason)
    if checkpoints:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is intact ({', '.join(path.name for path in checkpoints.values())}); put one"
            f" back, or train from the start: type rm -r '{folder}' and the same command again"
        )
    return None


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files of saves that a crash interrupted, and return their paths. The caller holds the folder's
    lock.
    """
    leftovers = sorted(path for path in folder.glob(".*.tmp") if _LEFTOVER.fullmatch(path.name) and path.is_file())
    for path in leftovers:
        path.unlink()
    return leftovers
