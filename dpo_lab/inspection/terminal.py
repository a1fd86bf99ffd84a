"""Print an inspection to the terminal: tables, warnings, and pairs token by token."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dpo_lab.inspection.look import Inspection
from dpo_lab.inspection.tables import Table, tables
from dpo_lab.inspection.token_view import CUT, LEGEND, PairView, Part

BLOCKS = " ▁▂▃▄▅▆▇█"
MARKS = {"prompt": ".", "chosen": "+", "rejected": "-"}
STYLES = {"prompt": "dim", "chosen": "#009e73", "rejected": "#d55e00"}  # Okabe and Ito's colour-blind safe colours
NO_WARNINGS = "No data warnings."
SPECIAL = " bold reverse"
MARGIN = 4


def show(console: Console, look: Inspection) -> None:
    """Print an inspection; markup in the data's texts is not interpreted."""
    _print(console, f"Pairs from {look.source}; tokenizer: {look.tokenizer}")
    for table in tables(look):
        _print(console, f"\n{table.title}", "bold")
        console.print(_table(table))
    for first, second in look.contrary:  # those that are in no split as well
        _print(console, f"Contradiction: {first} and {second}")
    if look.pairs:
        _print(console, f"\nPairs, tokens separated by spaces: {LEGEND}", "bold")
        _print(console, "+ scored as chosen, - scored as rejected, . not scored")
    for pair in look.pairs:
        _pair(console, pair)
    _print(console, "")
    for line in look.advice:
        _print(console, f"Warning: {line}", "#e69f00")
    if not look.advice:
        _print(console, NO_WARNINGS)


def bars(histogram: list[int]) -> str:
    """Return a histogram as a line of block characters; a count above 0 is always visible."""
    most = max(1, *histogram)
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // most)] for count in histogram)


def _table(table: Table) -> RichTable:
    made = RichTable()
    for i, column in enumerate(table.head):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    if table.bars is not None:
        made.add_column("", no_wrap=True)
    for i, row in enumerate(table.rows):
        cells = [*row, *([bars(table.bars[i])] if table.bars is not None else [])]
        made.add_row(*(Text(cell) for cell in cells))
    return made


def _pair(console: Console, pair: PairView) -> None:
    _print(console, f"\n{pair.place}  {pair.key}{pair.label}{pair.noise}", "bold")
    for part in pair.parts:
        _part(console, part)


def _part(console: Console, part: Part) -> None:
    _print(console, f"  {part.name}: {len(part.tokens)} tokens, {part.about}", STYLES[part.name])
    runs = [(scored, list(tokens)) for scored, tokens in groupby(part.tokens, lambda token: token.scored)]
    for at, (scored, tokens) in enumerate(runs):
        name = part.name if scored else "prompt"  # of the same look as the prompt, which is not scored
        style = STYLES[name]
        words = [Text(token.text, style + SPECIAL if token.special else style) for token in tokens]
        if part.cut and at == (len(runs) - 1 if part.scored else 0):
            words.insert(len(words) if part.scored else 0, Text(CUT, "bold"))
        for line in Text(" ").join(words).wrap(console, max(8, console.width - MARGIN - 1), overflow="fold"):
            line.rstrip()
            console.print(Text(f"  {MARKS[name]} ", style) + line, soft_wrap=True, highlight=False)


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style), soft_wrap=True, highlight=False)
