"""Read held-out prompts of the user's own from a file: text or chat messages in rows, or one prompt a line."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_lab.core.pairs import Pair, Tokens
from dpo_lab.data.encoding import read_chunk
from dpo_lab.data.formats import Format, Shape
from dpo_lab.data.messages import describe, field_error
from dpo_lab.data.readers import suffix
from dpo_lab.data.rows import BadData, Chunk, FileRows, check_exists
from dpo_lab.data.text import LONGEST, TOO_LONG
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.errors import LabError

log = logging.getLogger(__name__)

KEY = "evals.prompts"
PLAIN = ".txt"  # the suffix of a file with one prompt a line
UNLIMITED = 1 << 30  # tokens: no prompt is truncated, since it would be another prompt


@dataclass(frozen=True)
class FilePrompts:
    """The distinct prompts of a file. name: of the file; sha256: of its content; places: FILE:NUMBER of each; pairs: each
    as that of a pair with a placeholder for the response.
    """

    name: str
    sha256: str
    places: Sequence[str]
    pairs: Sequence[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def encode(self, encoder: PairTokenizer) -> list[Tokens]:
        """Return the prompts as token ids, a chat rendered by the tokenizer's template, none truncated.

        Raises BadData, with the location, for one that can't be rendered.
        """
        whole = replace(encoder, max_length=UNLIMITED, max_prompt_length=UNLIMITED - 1)
        encoded: list[Tokens] = []
        for place, pair in zip(self.places, self.pairs, strict=True):
            try:
                ids = whole.pairs([pair], Counter())[0].prompt if pair.is_chat else whole.prompt(str(pair.prompt))
            except (LabError, ValueError) as error:
                raise BadData(f"{place}: {error}") from None
            encoded.append(ids)
        return encoded


@dataclass
class PromptShape(Shape):
    """How rows with a `prompt`, as text or messages, and with `system` and `tools` if they have them, are read."""

    def read(self, row: Mapping[str, Any], counts: Counter[str] | None = None) -> list[Pair]:
        prompt = row.get("prompt")
        if prompt is None:
            raise field_error("prompt", f"is missing (the row {describe(row)})")
        if isinstance(prompt, bytes):  # a line of a plain text
            if len(prompt) > LONGEST:
                raise ValueError(TOO_LONG)
            prompt = prompt.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise field_error("prompt", "is empty")
        others = {name: row[name] for name in ("system", "tools") if name in row}
        return super().read({**others, "prompt": prompt, "completion": "a", "label": True}, counts)


def read_prompts(path: str, as_chat: bool, most: int) -> FilePrompts:
    """Return the first `most` distinct prompts of a file, in their order.

    A .txt file holds one prompt a line; other files hold rows with a `prompt`, in the formats of data.path. as_chat: text
    becomes a message of the user. Raises BadData for a bad row, and if there is no prompt, with location and what to type.
    """
    files = check_exists(path, KEY)
    if files is None:
        raise BadData(
            f"{KEY}={path}: no such file; type the path of a file with one prompt a line, or rows with a prompt"
        )
    shape = PromptShape(format=Format.unpaired, as_chat=as_chat)
    found: dict[str, tuple[str, Pair]] = {}
    for chunk in FileRows(files).chunks():
        bad: list[tuple[int, str, str]] = []
        for number, _, pairs in read_chunk(_with_prompts(chunk), shape, Counter(), bad):
            found |= {pair.key: (f"{chunk.place}:{number}", pair) for pair in pairs if pair.key not in found}
        for number, error, _ in bad:
            raise BadData(f"{chunk.place}:{number}: {error}; fix the row, which {KEY} reads")
    if not found:
        raise BadData(
            f"{KEY}={path}: holds no prompt; type the path of a file with one prompt a line, or rows with a prompt"
        )
    if len(found) > most:
        log.warning(
            "%s=%s: the first %d of %d prompts are used; for more type evals.num_prompts", KEY, path, most, len(found)
        )
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    places, pairs = zip(*list(found.values())[:most], strict=True)
    return FilePrompts(files[0].name if len(files) == 1 else path, digest, places, pairs)


def _with_prompts(chunk: Chunk) -> Chunk:
    """Return a chunk whose lines of plain text are rows with a prompt."""
    if suffix(Path(chunk.place)) != PLAIN:
        return chunk
    return replace(chunk, rows=[{"prompt": line} for line in chunk.rows])
