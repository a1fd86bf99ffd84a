"""View a pair token by token: which tokens are prompt, which are scored, which are special, where it was truncated."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import Tokens
from dpo_lab.data.tokenize import PairTokenizer

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
SPECIAL, PIECE, CUT = "⟦⟧", "‹›", "✂"  # around special tokens, around partial characters; where truncated
LEGEND = (
    f"␣ a space, ⏎ a line break, ⇥ a tab, {'...'.join(SPECIAL)} a special token, {'...'.join(PIECE)} a partial character as"
    f" the vocabulary names it, {CUT} truncated here"
)
MARKS = {*SIGNS.values(), *SPECIAL, *PIECE, CUT}


@dataclass(frozen=True)
class Token:
    """A token as text that is safe to print; scored: whether its log-probability enters the loss."""

    text: str
    special: bool
    scored: bool


@dataclass(frozen=True)
class Part:
    """The tokens of prompt, chosen or rejected; cut: truncated, a prompt at its start and a response at its end."""

    name: str
    tokens: list[Token]
    cut: bool

    @property
    def scored(self) -> bool:
        """Return whether the log-probabilities of its tokens, or of some of them, enter the loss."""
        return self.name != "prompt"

    @property
    def about(self) -> str:
        """Return whether the part is scored and where it was truncated."""
        if not self.scored:
            return "not scored, as long as allowed: may be truncated at its start" if self.cut else "not scored"
        count = sum(token.scored for token in self.tokens)
        what = "scored" if count == len(self.tokens) else f"{count} of them scored"
        return f"{what}, truncated at its end" if self.cut else what


@dataclass(frozen=True)
class PairView:
    """A pair as tokens. place: its location, `file:line` or a description; flipped: by label noise."""

    key: str
    place: str
    flipped: bool
    parts: list[Part]

    @property
    def label(self) -> str:
        """Return the label of a response that was labelled on its own, and whether there is no response."""
        match [part.name for part in self.parts if part.scored]:
            case []:
                return ", a prompt alone"
            case [name]:
                return ", desirable" if name == "chosen" else ", undesirable"
        return ""

    @property
    def noise(self) -> str:
        """Return what label noise changed."""
        what = "the label" if self.label else "chosen and rejected"
        return f", {what} swapped by label noise" if self.flipped else ""


def view_pair(table: PairTable, at: int, encoder: PairTokenizer, place: str) -> PairView:
    """Return the view of pair number `at` of a table."""
    pair = table[at]
    full = len(pair.prompt) >= encoder.max_prompt_length
    masks = pair.scored or [np.ones(len(ids), bool) for ids in (pair.chosen, pair.rejected)]
    parts = [Part("prompt", _tokens(pair.prompt, np.zeros(len(pair.prompt), bool), encoder), full)]
    for name, ids, scored in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), masks, strict=True):
        if not len(ids):
            continue
        cut = bool(encoder.is_truncated(len(pair.prompt), len(ids), ids[-1]))
        parts.append(Part(name, _tokens(ids, scored, encoder), cut))
    return PairView(pair.key, visible(place, blanks=False), pair.flipped, parts)


def visible(text: str, blanks: bool = True) -> str:
    """Return text with control characters and changes of direction escaped.

    blanks: show spaces, line breaks and tabs as SIGNS; otherwise keep spaces.
    """
    return "".join(_visible_character(character, blanks) for character in text)


def _visible_character(character: str, blanks: bool) -> str:
    if blanks and character in SIGNS:
        return SIGNS[character]
    if character == " ":
        return character
    if unicodedata.category(character)[0] in "CZ" or character in MARKS:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character


def _tokens(ids: Tokens, scored: np.ndarray, encoder: PairTokenizer) -> list[Token]:
    return [
        Token(_text(int(number), encoder), int(number) in encoder.special_ids, bool(is_scored))
        for number, is_scored in zip(ids, scored, strict=True)
    ]


def _text(number: int, encoder: PairTokenizer) -> str:
    """Return the text that a token adds; for a partial character its name in the vocabulary."""
    tokenizer = encoder.tokenizer
    name = visible(str(tokenizer.convert_ids_to_tokens(number)))
    if number in encoder.special_ids:
        return name.join(SPECIAL)
    alone, both = (
        str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for ids in (encoder.anchor, [*encoder.anchor, number])
    )
    added = both.removeprefix(alone)
    return visible(added) if both.startswith(alone) and added and "\ufffd" not in added else name.join(PIECE)
