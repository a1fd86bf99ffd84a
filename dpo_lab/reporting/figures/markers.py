"""The parts of SVG charts: markers, dashes, bars and swatches, distinguishable without colour."""

from __future__ import annotations

import unicodedata
from html import escape

STYLES = 7  # distinct by colour, marker and dash; GREY is for all further ones
GREY = "x"
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4")
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # characters that change the direction of text
CHARACTER = 6.6  # px, width of a wide character at the font size of drawings


def strip_control(text: str) -> str:
    """Return text with control characters and changes of direction escaped; line breaks and tabs stay."""
    return "".join(_escape_character(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character in DIRECTIONS or (unicodedata.category(character) == "Cc" and character not in "\n\t")


def escape_text(text: str) -> str:
    """Return text escaped for HTML."""
    return escape(strip_control(text))


def swatch(look: int | str, is_line: bool = True, dash: str | None = None, has_marker: bool = True) -> str:
    """Return the SVG that a legend shows before a label."""
    line = f'<line class="line"{dashed(look, dash)} x1="0" x2="28" y1="7" y2="7"/>' if is_line else ""
    mark = marker(14, 7, look) if has_marker else ""
    return (
        f'<svg class="swatch c{look}" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{line}{mark}</svg>'
    )


def elide(text: str, most: int) -> str:
    """Return the text, its middle elided if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def marker(x: float, y: float, look: int | str) -> str:
    """Return the SVG of a marker in a style."""
    shape = look if isinstance(look, int) else 0
    if shape % STYLES == 0:
        return f'<circle class="mark" cx="{px(x)}" cy="{px(y)}" r="4"/>'
    corners = {
        1: ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        2: ((0, -4.8), (4.4, 3.4), (-4.4, 3.4)),
        3: ((0, -5), (5, 0), (0, 5), (-5, 0)),
        4: ((0, 4.8), (4.4, -3.4), (-4.4, -3.4)),
        5: ((-5, -1.6), (5, -1.6), (5, 1.6), (-5, 1.6)),
        6: ((-1.6, -5), (1.6, -5), (1.6, 5), (-1.6, 5)),
    }[shape % STYLES]
    return f'<path class="mark" d="M{"L".join(f"{px(x + right)} {px(y + down)}" for right, down in corners)}Z"/>'


def bar(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return the SVG of an error bar."""
    return f'<line class="bar" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>'


def dashed(look: int | str, dash: str | None) -> str:
    """Return the dash attribute of a style, or of `dash` if given."""
    dash = dash if dash is not None else DASHES[look % STYLES] if isinstance(look, int) else ""
    return f' stroke-dasharray="{dash}"' if dash else ""


def px(value: float) -> str:
    """Return px as text to a tenth, limited to a range that every renderer handles."""
    return f"{min(max(value, -9999.0), 9999.0):.1f}".removesuffix(".0")


def _escape_character(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
