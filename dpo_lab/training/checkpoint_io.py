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
    """A checkpoint can't be written, or can't be gone on from; the message names the file and says what to type."""


class VerifiedCheckpointIO(CheckpointIO):
    """Checkpoints with their checksum in the zip archive's comment, so that plain torch.load reads them, mapped or not.

    A file is streamed to a temporary sibling, so neither memory nor another file system holds it a second time, and a
    crash at any point leaves the old file or the new one.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises CheckpointError where the disk does not take it; what stood at `path` is untouched then."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
                sync(path.parent.parent)
            with beside.open("w+b") as file:
                _write(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync(path.parent)
        except OSError as error:
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror}); checkpoints before it are intact: make room, then type"
                " the same command again, which goes on from the newest"
            ) from error
        finally:
            with suppress(OSError):  # it is gone where it was put in its place
                beside.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint's plain values and tensors, once its checksum holds; nothing in it is ever executed."""
        if reason := damage(Path(path)):
            raise CheckpointError(f"{path}: {reason}; delete it, and the same command goes on from the one before")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (UnpicklingError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: holds more than plain values and is not read ({first})") from None

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class _HashingWriter:
    """Passes on what torch.save writes and keeps its checksum.

    torch turns an error in `write` into one of its own, without what the disk said: `error` is the true one.
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
        torch.save(checkpoint, writer)  # type: ignore[arg-type]  # all it asks for is `write`
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise
    file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment, 0 so far
    file.write(_trailer(writer.digest.hexdigest()))


def _trailer(hexdigest: str) -> bytes:
    comment = _MARK + hexdigest.encode()
    return len(comment).to_bytes(2, "little") + comment


def damage(path: Path) -> str | None:
    """Why a file is no whole checkpoint: its checksum does not hold. None where it is one."""
    left = path.stat().st_size - _TRAILER
    digest = hashlib.blake2b(digest_size=_DIGEST)
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(b"\0\0")  # the comment's length, as it stood when the checksum was taken
        if left < 0 or file.read() != _trailer(digest.hexdigest()):
            return "damaged, its checksum does not hold"
    return None


def by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder, whole or not, by the optimizer steps that were done; the newest last."""
    if not folder.is_dir():
        return {}
    named = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    return dict(sorted((int(name[1]), path) for path, name in named.items() if name and path.is_file()))


def step_of(path: Path) -> int:
    """The optimizer steps that were done when a checkpoint was taken."""
    named = _NAME.fullmatch(path.name)
    assert named is not None
    return int(named[1])


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, None where there is none; a damaged one is passed over, with a warning.

    Raises CheckpointError where all are damaged: to start anew is the user's to decide.
    """
    found = by_step(folder)
    for path in reversed(found.values()):
        if (reason := damage(path)) is None:
            return path
        log.warning("%s: %s; passed over for the one before", path, reason)
    if found:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is whole ({', '.join(path.name for path in found.values())}); put one back,"
            f" or start anew: type rm -r '{folder}' and the same command again"
        )
    return None


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what saves that a crash cut short left behind, and nothing else; gives what it was. The caller holds
    `folder`.
    """
    left = sorted(path for path in folder.glob(".*.tmp") if _LEFTOVER.fullmatch(path.name) and path.is_file())
    for path in left:
        path.unlink()
    return left
