"""The page of an inspection: one HTML file that loads nothing, runs nothing and prints well; all text in it is escaped."""

from __future__ import annotations

from html import escape

from dpo_lab.data.shown import CUT, LEGEND, Part, ShownPair
from dpo_lab.inspection.figure import MADE_BY, svg
from dpo_lab.inspection.look import Look
from dpo_lab.inspection.tables import Table, tables
from dpo_lab.inspection.terminal import MARKS

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #fff; --line: #ccc; --dim: #666; --chosen: #00694d;
  --rejected: #a34700; --look: #fff4d6; --chip: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #161616; --line: #444; --dim: #9a9a9a;
  --chosen: #2fc79a; --rejected: #ff8a3d; --look: #3a2f10; --chip: #242424; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: .95rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; font-weight: normal; }
.wide { overflow-x: auto; } .wide svg { max-width: 100%; height: auto; }
.bars { width: 10rem; height: 1.6rem; fill: currentColor; display: block; }
.look { background: var(--look); padding: .4rem .8rem; margin: .4rem 0; border-left: 4px solid #e69f00; }
.part { margin: .3rem 0; } .part > span:first-child, .dim { color: var(--dim); font-size: .85rem; }
.tokens { font-family: ui-monospace, monospace; font-size: .85rem; line-height: 1.9; overflow-wrap: anywhere; margin: 0; }
.tokens span { background: var(--chip); border-radius: 3px; padding: 1px 2px; }
.prompt span { color: var(--dim); }
.chosen span { color: var(--chosen); border-bottom: 2px solid; }
.rejected span { color: var(--rejected); border-bottom: 2px dashed; }
.tokens .special { outline: 1px solid; font-weight: bold; } .tokens .cut { color: var(--ink); border: 0; font-weight: bold; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } section, table { break-inside: avoid; }
  .tokens span { background: none; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(look: Look) -> str:
    """The whole page."""
    lines = [
        "<!doctype html>",
        f"<!-- {MADE_BY} -->",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(f'Pairs of {look.source}')}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(f'Preference pairs of {look.source}')}</h1>",
        f'<p class="dim">{escape(f"Tokens of {look.tokenizer}. Made by python -m {MADE_BY}.")}</p>',
        *_advice(look),
        *(line for table in tables(look) for line in _table(table)),
        f'<h2>Lengths</h2><div class="wide">{svg(look.quality)}</div>',
        *_pairs(look),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _advice(look: Look) -> list[str]:
    lines = look.advice or ["Nothing here that an expert would stop at."]
    boxes = [f'<p class="look">{escape(line)}</p>' for line in lines]
    return [*boxes, *(f"<p>{escape(f'Contradiction: {a} and {b}')}</p>" for a, b in look.contrary)]


def _table(table: Table) -> list[str]:
    drawn = [_bars(histogram) for histogram in table.bars] if table.bars is not None else [""] * len(table.rows)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}{bars}</tr>'
        for row, bars in zip(table.rows, drawn, strict=True)
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
    label = escape(f"pairs a bin: {', '.join(map(str, histogram))}")
    return f'<td><svg class="bars" role="img" aria-label="{label}" {box}>{bars}</svg></td>'


def _pairs(look: Look) -> list[str]:
    if not look.pairs:
        return []
    legend = f"Each box is a token: {LEGEND}. Underlined (+): scored as chosen; dashed (-): scored as rejected; grey (.): not."
    return [f"<h2>Pairs, token by token</h2><p>{escape(legend)}</p>", *(_pair(pair) for pair in look.pairs)]


def _pair(pair: ShownPair) -> str:
    flipped = ", sides swapped by label noise" if pair.flipped else ""
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
