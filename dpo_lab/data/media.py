"""Detect images, sound and video beside the text of a row; none of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dpo_lab.core.pairs import Pair
from dpo_lab.data.messages import field_error
from dpo_lab.data.row_faults import MEDIA

UNREAD = b"not read"  # placeholder in a row for bytes that are not read
COLUMN = re.compile(
    r"(?:\w*_)?(?:image|img|picture|photo|audio|sound|speech|video)s?(?:_(?:path|url|file|bytes)s?)?", re.I
)
# Placeholders of images, sound or video in a text: <image>, <|audio|>, <image_1>, <|vision_start|>, [IMG], ...
PLACE = re.compile(r"<\|?(?:start_of_)?(?:image|img|audio|video|vision)[\w-]*\|?>|\[IMG\]", re.I)


def check_media(row: Mapping[str, Any], read: Collection[str], pairs: Iterable[Pair], counts: Counter[str]) -> None:
    """Count a row that has columns of media; raise ValueError if its text refers to them. read: the columns of text."""
    names = (name for name, value in row.items() if isinstance(name, str) and name not in read and _holds(name, value))
    if name := next(names, None):
        counts[MEDIA] += 1
        if mark := next(filter(None, map(_place_in, pairs)), None):
            raise field_error(name, f"is not read, and the row's text refers to it ({mark}): only text can train")


def is_media(kind: Any) -> bool:
    """Return whether an Arrow type holds bytes: bytes, bytes with their path as in `datasets`, or lists of these."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_media(kind.value_type)
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return fields.keys() <= {"bytes", "path"} and any(map(is_media, fields.values()))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _holds(name: str, value: Any) -> bool:
    return value == UNREAD or (bool(COLUMN.fullmatch(name)) and _is_there(value))


def _is_there(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_there, value.values()))
    if isinstance(value, list):
        return any(map(_is_there, value))
    return value not in (None, "", False)


def _place_in(pair: Pair) -> str | None:
    """Return the first placeholder of an image, a sound or a video in the pair's text, or None."""
    for text in (pair.prompt, pair.chosen, pair.rejected):
        for words in [text] if isinstance(text, str) else [str(message.get("content", "")) for message in text]:
            if found := PLACE.search(words):
                return found[0]
    return None
