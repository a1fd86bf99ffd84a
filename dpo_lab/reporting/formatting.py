"""Numbers and foreign text as readers see them: digits and signs, control characters escaped."""

from __future__ import annotations

import math
import unicodedata

DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # characters that change the direction of text


def strip_control(text: str) -> str:
    """Return text with control characters and changes of direction escaped; line breaks and tabs stay."""
    return "".join(_escape_character(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character in DIRECTIONS or (unicodedata.category(character) == "Cc" and character not in "\n\t")


def _escape_character(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def format_value(value: float) -> str:
    """Return a number as text for a table: three decimals, fewer if it is large, an exponent if it is tiny."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e5:
        return _with_unit(value)
    if size and size < 5e-4:
        return f"{value:.1e}"
    text = f"{value:,.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return text.removeprefix("-") if not float(text.replace(",", "")) else text


def signed(value: float) -> str:
    """Return a number as text, with its sign."""
    text = format_value(value)
    return text if text.startswith("-") else f"+{text}"


def format_short(value: float) -> str:
    """Return a number as short text: 0.1, 3, 2.5k."""
    return _with_unit(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _with_unit(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
