"""The cache of composed job configs: composing one takes a fifth of a second, reading it nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import omegaconf
from filelock import FileLock
from hydra import __version__ as hydra_version

from dpo_lab.runs.atomic_write import write_atomic

LIMIT = 2000  # jobs per file: the most recently planned ones
KEPT = 4  # files: the most recent states of the sources

# Resolvers that depend on the config and this package only; a config with any other may change and is not cached.
DETERMINISTIC = frozenset(
    "hydra run_name run_slug not_in_folder_names default_evaluators describe_choices gpus_per_node reward_learning_rate"
    " oc.select oc.decode oc.dict.keys oc.dict.values".split()
)


class PlanCache:
    """Composed jobs by their overrides, valid as long as no YAML file and no source file of the package changes."""

    def __init__(self, root: Path, sources: str | None) -> None:
        self._path = None if sources is None else root / f"{sources}.json"
        self._known, self._fresh = self._read(), {}

    def _read(self) -> dict[str, Any]:
        """Return the jobs in the file; none if it can't be read, and all are composed again."""
        try:
            return json.loads(self._path.read_text()) if self._path is not None else {}
        except (FileNotFoundError, ValueError):
            return {}

    def get(self, overrides: Sequence[str]) -> dict[str, Any] | None:
        """Return what `put` stored for these overrides, if no file was added or removed beside its input files."""
        key = _digest(json.dumps(list(overrides)).encode())
        found = self._known.get(key)
        if found is None or found["folders"] != _times(found["folders"]):
            return None
        self._fresh[key] = found
        return found["job"]

    def put(self, overrides: Sequence[str], job: Mapping[str, Any], files: Iterable[str]) -> None:
        """Store a job as plain values, valid until a file is added to or removed from the folders of `files`."""
        if self._path is not None and not any(_may_vary(text) for text in overrides):
            folders = _times({str(Path(file).parent) for file in files})
            self._fresh[_digest(json.dumps(list(overrides)).encode())] = {"job": dict(job), "folders": folders}

    def save(self) -> None:
        """Write new jobs atomically, merged with those another sweep has written meanwhile; drop the oldest."""
        if self._path is None or self._fresh.keys() <= self._known.keys():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.parent / ".lock"):
            merged = {key: job for key, job in self._read().items() if key not in self._fresh} | self._fresh
            write_atomic(self._path, json.dumps(dict(list(merged.items())[-LIMIT:])))
            files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            for path in files[:-KEPT]:
                path.unlink()


def digest_of_sources(config_sources: Iterable[Any], package: Path) -> str | None:
    """Return a hash of all that determines a job's config besides its overrides; None if it is unknown or may vary.

    config_sources: those of Hydra, each with a schema and a path.
    """
    files = [*package.rglob("*.py")]
    for source in config_sources:
        if source.schema == "file":
            files += [path for path in Path(source.path).rglob("*") if path.suffix in (".yaml", ".yml")]
        elif source.schema == "pkg" and source.path != "hydra.conf":
            return None
    digest = hashlib.blake2b(f"{hydra_version} {omegaconf.__version__}".encode(), digest_size=16)
    for path in sorted(files):
        content = path.read_bytes()
        if path.suffix != ".py" and _may_vary(content.decode(errors="replace")):
            return None
        digest.update(f"{path} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _may_vary(text: str) -> bool:
    return any(name not in DETERMINISTIC for name in re.findall(r"\$\{\s*([\w.]+)\s*:", text))


def _times(folders: Iterable[str]) -> dict[str, int]:
    return {folder: Path(folder).stat().st_mtime_ns if Path(folder).exists() else 0 for folder in folders}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()
