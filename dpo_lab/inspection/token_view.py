"""View a pair token by token: which tokens are prompt, which are scored, which are special, where it was truncated."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import Tokens
from dpo_lab.data.tokenize import PairTokenizer

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
SPECIAL, PIECE, CUT = "⟦⟧", "‹›", "✂"  # around a special token, around a piece of a character; where tokens are missing
LEGEND = (
    f"␣ a space, ⏎ a line break, ⇥ a tab, {'...'.join(SPECIAL)} a special token, {'...'.join(PIECE)} a piece of a character as"
    f" the vocabulary writes it, {CUT} cut here"
)
MARKS = {*SIGNS.values(), *SPECIAL, *PIECE, CUT}


@dataclass(frozen=True)
class Token:
    """A token as text that can be printed anywhere."""

    text: str
    special: bool


@dataclass(frozen=True)
class Part:
    """The tokens of prompt, chosen or rejected; cut: truncated, a prompt at its start and a response at its end."""

    name: str
    tokens: list[Token]
    cut: bool

    @property
    def scored(self) -> bool:
        """Whether its tokens' log-probabilities are what the loss is made of."""
        return self.name != "prompt"

    @property
    def about(self) -> str:
        if not self.scored:
            return "not scored, as many as may be: cut at its start" if self.cut else "not scored"
        return "scored, cut at its end" if self.cut else "scored"


@dataclass(frozen=True)
class PairView:
    """A pair to look at. place: `file:line`, or where else it comes from; flipped: by label noise."""

    key: str
    place: str
    flipped: bool
    parts: list[Part]


def view_pair(table: PairTable, at: int, encoder: PairTokenizer, place: str) -> PairView:
    """One pair of a table."""
    pair = table[at]
    full = len(pair.prompt) >= encoder.max_prompt_length
    parts = [Part("prompt", _tokens(pair.prompt, encoder), full)]
    for name, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        cut = bool(encoder.cut(len(pair.prompt), len(ids), ids[-1]))
        parts.append(Part(name, _tokens(ids, encoder), cut))
    return PairView(pair.key, visible(place, blanks=False), pair.flipped, parts)


def visible(text: str, blanks: bool = True) -> str:
    """Text in which everything can be seen and nothing acts: no control character, no change of direction.

    blanks: spaces, line breaks and tabs are shown by SIGNS; else a space stays one.
    """
    return "".join(_seen(character, blanks) for character in text)


def _seen(character: str, blanks: bool) -> str:
    if blanks and character in SIGNS:
        return SIGNS[character]
    if character == " ":
        return character
    if unicodedata.category(character)[0] in "CZ" or character in MARKS:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character


def _tokens(ids: Tokens, encoder: PairTokenizer) -> list[Token]:
    return [Token(_text(int(number), encoder), int(number) in encoder.special_ids) for number in ids]


def _text(number: int, encoder: PairTokenizer) -> str:
    """What a token adds to a text; of one that is a piece of a character, its name in the vocabulary."""
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
