"""Run folders and their record: names, locks, `run.json`. The record is the truth; nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_lab.stop import Stopped

RECORD = "run.json"
VOLATILE = ("name", "on_change", "objective", "data.num_workers")  # settings that change no result
SECRET = re.compile(r"(api_?key|token|secret|password|credential)$", re.I)


class RunRefused(Exception):
    """The folder can't take this run; the message says why and what to type."""


class Standing(str, Enum):
    """What a folder means to a run: nothing yet, some of its way, all of it."""

    new = "new"
    unfinished = "unfinished"
    done = "done"


def slug(overrides: str, limit: int = 100) -> str:
    """A folder name for a run's overrides (`a=1,b=2`): readable, at most `limit` characters, without collisions."""
    plain = re.sub(r"(^|,)\+", r"\1", overrides)
    clean = re.sub(r"[^\w.=,-]+", "_", plain).strip("_.")
    if clean != plain or len(clean) > limit:
        clean = f"{clean[: limit - 9]}-{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"
    return clean or "default"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The folder's record, None where there is none."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None


class Run:
    """A run's folder while the run holds it. The record is committed whole at every `update`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record

    def update(self, **entries: Any) -> None:
        self.record |= entries
        beside = self.folder / f".{RECORD}.{os.getpid()}"
        with beside.open("w") as file:
            json.dump(self.record, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.folder / RECORD)


@contextmanager
def hold(folder: Path, config: Mapping[str, Any], overrides: list[str]) -> Iterator[Run | None]:
    """Take a folder for a run of `config`; None where a finished run of the same config is there already.

    The record says `running` until the body ends: then `done`, `interrupted`, or `failed` with the error. Earlier runs
    that did not finish are moved aside, never overwritten. Raises RunRefused when another process holds the folder or a
    finished run of another config lies in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunRefused(f"{folder} is being written by another process; wait for it, or type name=another") from None
    try:
        if is_done(folder, config):
            yield None
            return
        _move_aside(folder)
        run = Run(folder, _opening(config, overrides))
        run.update(status="running")
        try:
            yield run
        except BaseException as error:
            status = error.status if isinstance(error, Stopped) else "failed"
            what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            run.update(status=status, error=what, finished=_now())
            raise
        run.update(status="done", finished=_now())
    finally:
        lock.release()


def is_done(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a finished run of this config lies in the folder. Raises RunRefused if it is one of another config."""
    record = read_record(folder)
    if record is None or record["status"] != "done":
        return False
    changed = difference(record["config"], redact(config))
    if changed:
        lines = "; ".join(f"{key}: was {was!r}, now {now!r}" for key, (was, now) in changed.items())
        raise RunRefused(f"{folder} holds a finished run of another config ({lines}); type name=another, or delete it")
    return True


def standing(folder: Path, config: Mapping[str, Any], files: Sequence[Path] = ()) -> Standing:
    """Whether a run of `config` is new to the folder, has begun there, or is done. Raises RunRefused if another one is."""
    if is_done(folder, config):
        return Standing.done
    return Standing.new if read_record(folder) is None else Standing.unfinished


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, VOLATILE ones left out."""
    was, now = flatten(was), flatten(now)
    return {
        key: (was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in VOLATILE
    }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def redact(config: Any) -> Any:
    """The config with the values of keys that name a secret left out."""
    if isinstance(config, Mapping):
        return {k: "<redacted>" if SECRET.search(str(k)) and v is not None else redact(v) for k, v in config.items()}
    return [redact(v) for v in config] if isinstance(config, list) else config


def redact_override(override: str) -> str:
    """`key=value` with its value left out where the key names a secret."""
    key, equals, _ = override.partition("=")
    return f"{key}{equals}<redacted>" if equals and SECRET.search(key) else override


def _opening(config: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    return {
        "status": "running",
        "started": _now(),
        "config": redact(config),
        "overrides": [redact_override(override) for override in overrides],
        "versions": _versions(),
        "git": _git_state(),
    }


def _move_aside(folder: Path) -> None:
    """Keep what an unfinished earlier run left, in `unfinished-N` inside the folder."""
    left = [
        p for p in folder.iterdir() if p.name not in (".lock", "output.log") and not p.name.startswith("unfinished-")
    ]
    if (folder / RECORD) not in left:
        return
    number = 1 + sum(p.name.startswith("unfinished-") for p in folder.iterdir())
    aside = folder / f"unfinished-{number}"
    aside.mkdir()
    for path in left:
        os.replace(path, aside / path.name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("dpo_lab", "torch", "lightning", "transformers", "tokenizers", "hydra-core", "torchmetrics")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _git_state() -> dict[str, Any] | None:
    """Commit of the package's checkout and whether it was changed; None outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", ".", "../conf"))}
    except (OSError, subprocess.SubprocessError):
        return None
