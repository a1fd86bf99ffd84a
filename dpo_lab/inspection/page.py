"""The HTML page of an inspection: one offline file; all text in it is escaped."""

from __future__ import annotations

from html import escape

from dpo_lab.inspection.figure import MADE_BY, svg
from dpo_lab.inspection.look import Inspection
from dpo_lab.inspection.tables import Table, tables
from dpo_lab.inspection.terminal import MARKS, NO_WARNINGS
from dpo_lab.inspection.token_view import CUT, LEGEND, PairView, Part
from dpo_lab.reporting.html_page import document

STYLE = """
.bars { width: 10rem; height: 1.6rem; fill: currentColor; display: block; }
.figure * { stroke-linejoin: round; stroke-linecap: butt; }
.part { margin: .3rem 0; } .part > span:first-child { color: var(--dim); font-size: .85rem; }
.tokens { font-family: ui-monospace, monospace; font-size: .85rem; line-height: 1.9; overflow-wrap: anywhere; margin: 0; }
.tokens span { background: var(--chip); border-radius: 3px; padding: 1px 2px; }
.prompt span { color: var(--dim); }
.chosen span { color: var(--chosen); border-bottom: 2px solid; }
.rejected span { color: var(--rejected); border-bottom: 2px dashed; }
.tokens .special { outline: 1px solid; font-weight: bold; } .tokens .cut { color: var(--ink); border: 0; font-weight: bold; }
@media print { .tokens span { background: none; } }
"""


def page(look: Inspection) -> str:
    """Return the page of an inspection."""
    title = f"Preference pairs from {look.source}"
    lines = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(f"Tokenizer: {look.tokenizer}. Written by python -m {MADE_BY}.")}</p>',
        *_advice(look),
        *(line for table in tables(look) for line in _table(table)),
        f'<h2>Lengths</h2><div class="wide figure">{svg(look.quality)}</div>',
        *_pairs(look),
    ]
    return document(f"Pairs from {look.source}", MADE_BY, "\n".join(lines), STYLE)


def _advice(look: Inspection) -> list[str]:
    lines = look.advice or [NO_WARNINGS]
    boxes = [f'<p class="look">{escape(line)}</p>' for line in lines]
    return [*boxes, *(f"<p>{escape(f'Contradiction: {a} and {b}')}</p>" for a, b in look.contrary)]


def _table(table: Table) -> list[str]:
    bars = [_bars(histogram) for histogram in table.bars] if table.bars is not None else [""] * len(table.rows)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}{bar}</tr>'
        for row, bar in zip(table.rows, bars, strict=True)
    ]
    last = '<th scope="col">histogram</th>' if table.bars is not None else ""
    return [f'<h2>{escape(table.title)}</h2><div class="wide"><table><tr>{head}{last}</tr>', *rows, "</table></div>"]


def _bars(histogram: list[int]) -> str:
    most = max(1, *histogram)
    bars = "".join(
        f'<rect x="{10 * i}" y="{40 - 40 * n / most:.2f}" width="9" height="{40 * n / most:.2f}"/>'
        for i, n in enumerate(histogram)
    )
    box = f'viewBox="0 0 {10 * len(histogram)} 40" preserveAspectRatio="none"'
    label = escape(f"pairs per bin: {', '.join(map(str, histogram))}")
    return f'<td><svg class="bars" role="img" aria-label="{label}" {box}>{bars}</svg></td>'


def _pairs(look: Inspection) -> list[str]:
    if not look.pairs:
        return []
    marks = "Underlined (+): scored as chosen; dashed (-): scored as rejected; grey (.): not scored."
    legend = f"Each box is a token: {LEGEND}. {marks}"
    return [f"<h2>Pairs, token by token</h2><p>{escape(legend)}</p>", *(_pair(pair) for pair in look.pairs)]


def _pair(pair: PairView) -> str:
    flipped = ", chosen and rejected swapped by label noise" if pair.flipped else ""
    head = f"<h3>{escape(pair.place)} <span class='dim'>{escape(pair.key)}{flipped}</span></h3>"
    return f"<section>{head}{''.join(_part(part) for part in pair.parts)}</section>"


def _part(part: Part) -> str:
    words = [
        f'<span class="special">{escape(token.text)}</span>' if token.special else f"<span>{escape(token.text)}</span>"
        for token in part.tokens
    ]
    if part.cut:
        words.insert(len(words) if part.scored else 0, f'<span class="cut">{CUT}</span>')
    about = f"{MARKS[part.name]} {part.name}: {len(part.tokens)} tokens, {part.about}"
    return f'<div class="part"><span>{escape(about)}</span><p class="tokens {part.name}">{" ".join(words)}</p></div>'
