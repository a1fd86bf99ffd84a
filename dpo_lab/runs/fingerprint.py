"""The fingerprint of a run: its settings without those that do not change results, and the files it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lab.runs.redact import redact

# Settings, with all keys under them, that do not change results, by what they change instead.
RECORD_KEYS = ("name", "if_exists", "figures", "optimized_metric")  # where a run is recorded and what is drawn of it
TRAJECTORY_KEYS = ("evals.every", "evals.num_trajectory_prompts")
LOGGING_KEYS = ("logger", "callbacks.checkpoint", "callbacks.health", "callbacks.progress", *TRAJECTORY_KEYS)
EXECUTION_KEYS = (
    "launcher",
    "data.num_workers",
    "data.tokenize_workers",
    "evals.batch_size",
    "evals.judge.workers",
    "evals.judge.timeout",
    "evals.judge.attempts",
    "policy.activation_offload",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
LENGTH_KEYS = ("trainer.max_time", "trainer.max_steps")  # a run may get more steps: checked separately
KEYS_WITHOUT_EFFECT = (*RECORD_KEYS, *LOGGING_KEYS, *EXECUTION_KEYS, *LENGTH_KEYS)
NOT_IN_FOLDER_NAMES = ("seed", *RECORD_KEYS, *EXECUTION_KEYS, *LENGTH_KEYS)


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a hash of the settings without KEYS_WITHOUT_EFFECT and without secrets."""
    text = json.dumps(effective_config(redact(config)), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (was, now) of the settings that differ, without KEYS_WITHOUT_EFFECT."""
    was, now = effective_config(was), effective_config(now)
    return {
        key: (was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    }


def effective_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by dotted key, without KEYS_WITHOUT_EFFECT."""
    return {key: value for key, value in flatten(config).items() if not is_under(key, KEYS_WITHOUT_EFFECT)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size, modification time and content hash of each file."""
    return {str(file): {**_stat(file), "blake2b": _digest(file)} for file in files}


def changed_files(recorded: Mapping[str, Mapping[str, Any]], files: Sequence[Path]) -> list[str]:
    """Describe how files changed since their fingerprint; return an empty list if they did not.

    A file with the same size and modification time is not read again.
    """
    now = {str(file): file for file in files}
    gone = [f"{name} is no longer read" for name in recorded if name not in now]
    added = [f"{name} was not read then" for name in now if name not in recorded]
    changed = [f"{name} has changed since" for name, file in now.items() if _has_changed(recorded.get(name), file)]
    return gone + added + changed


def override_key(override: str) -> str:
    """Return the key of an override, `key=value` with Hydra's + or ~."""
    return override.lstrip("+~").partition("=")[0]


def is_under(key: str, keys: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `keys` or lies under one."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _has_changed(recorded: Mapping[str, Any] | None, file: Path) -> bool:
    if recorded is None:
        return False
    stat = _stat(file)
    if all(recorded[name] == stat[name] for name in stat):
        return False
    return recorded["bytes"] != stat["bytes"] or recorded["blake2b"] != _digest(file)


def _stat(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
