"""Redact secrets: values of keys that name a secret, tokens by their shape, passwords in URLs."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
_NAME = r"(?:api_?key|access_?key|private_?key|token|secret|passw(?:or)?d|credentials?)"
_NAMES = re.compile(f"{_NAME}$", re.I)
_ENTRY = re.compile(
    rf"""(?P<key>^[\s-]*['"]?[^\s:'"]*{_NAME}['"]?: |{_NAME}=)(?!null$)('([^']|'')*'|"([^"\\]|\\.)*"|\S.*)""",
    re.I | re.M,
)
_LOOKS = re.compile(
    r"\b(hf_\w{16,}|sk-[\w-]{20,}|gh[opsur]_\w{30,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_IN_URL = re.compile(r"(?<=://)[^\s/@]+:[^\s/@]+(?=@)")
_SHORTEST = 8  # characters: shorter values of environment variables would match unrelated text


def redact(value: Any) -> Any:
    """Return a config, or part of one, without the values of keys that name a secret and without secrets in strings."""
    if isinstance(value, Mapping):
        return {k: REDACTED if _NAMES.search(str(k)) and v is not None else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v) for v in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_override(override: str) -> str:
    """Return an override `key=value` without its value if the key names a secret, else without secrets in it."""
    key, equals, _ = override.partition("=")
    return f"{key}{equals}{REDACTED}" if equals and _NAMES.search(key) else redact_text(override)


def redact_command(words: Sequence[str]) -> str:
    """Return a command line, quoted for a shell, without secrets."""
    return shlex.join(redact_override(word) for word in words)


def redact_text(text: str) -> str:
    """Return a text without tokens, passwords in URLs, and the values of environment variables that name a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name) and value in text:
            text = text.replace(value, REDACTED)
    return _IN_URL.sub(REDACTED, _LOOKS.sub(REDACTED, text))


def redact_yaml(text: str) -> str:
    """Return YAML text without secrets, also in overrides listed in it; there the rest of the line is redacted too."""
    return redact_text(_ENTRY.sub(rf"\g<key>{REDACTED}", text))


class Redacting(logging.Formatter):
    """A log formatter that redacts secrets in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))
