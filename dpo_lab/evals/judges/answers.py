"""The store of a judge's answers: an SQLite file in the cache, so that no question is paid for twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

CHUNK = 500  # keys of one query; SQLite takes 999 parameters at least


class AnswerStore:
    """Answers by a hash of all that determines the question. Each is on disk when `add` returns; several processes and
    threads may use one file. path: None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False)
        self._lock = Lock()
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def find(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return those answers that are stored, by key."""
        keys, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(keys), CHUNK):
            part = keys[start : start + CHUNK]
            marks = ", ".join("?" * len(part))
            with self._lock:
                found |= dict(self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part))
        return {key: json.loads(answer) for key, answer in found.items()}

    def add(self, key: str, answer: Any) -> None:
        """Store an answer, a value of JSON."""
        with self._lock:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
