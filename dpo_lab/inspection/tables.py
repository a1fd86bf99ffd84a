"""The tables of an inspection as plain cells, for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dpo_lab.data.quality import PARTS, Margins, Quality, Side
from dpo_lab.inspection.look import Inspection
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.text import format_interval, percent

# reasons to drop rows that are shown even with count 0
USUAL = ("bad row", "duplicate", "identical sides", "identical after truncation")
Cells = tuple[str, ...]

_percent = partial(percent, decimals=1)


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column names the row. bars: a histogram per row, or None."""

    title: str
    head: Cells
    rows: list[Cells]
    bars: list[list[int]] | None = None


def tables(look: Inspection) -> list[Table]:
    """Return the tables: row counts, quality, token lengths, and label noise if there is any."""
    quality = look.quality
    shown = [_counts(quality), _findings(quality), _lengths(quality)]
    return [*shown, *([_noise(quality)] if quality.noise.total else [])]


def _counts(quality: Quality) -> Table:
    rows = quality.counts.get("rows", 0)
    counts = {what: count for what, count in quality.counts.items() if count}
    counts |= {f"dropped: {reason}": 0 for reason in USUAL if f"dropped: {reason}" not in counts}
    return Table(
        "Rows: used and dropped",
        ("", "count", "share of rows"),
        [
            (what, f"{count:,}", _percent(count / rows) if rows and what != "rows" else "")
            for what, count in counts.items()
        ],
    )


def _findings(quality: Quality) -> Table:
    sides = quality.sides.values()
    blank = [""] * (len(sides) - 1)

    def row(what: str, cell) -> Cells:
        return (what, *(cell(side) for side in sides))

    rows = [
        row("pairs", lambda s: f"{s.pairs:,}"),
        row("distinct prompts", lambda s: f"{s.prompts:,}"),
        row("pairs of the most frequent prompt", lambda s: f"{s.most_of_a_prompt:,}"),
        row("repeated pairs (equal tokens)", lambda s: f"{s.repeated:,}"),
        row("contradictions, A > B and B > A (equal tokens)", lambda s: f"{s.contradictions:,}"),
        ("rows dropped because their prompt is held out", f"{quality.leaks_dropped:,}", *blank),
        ("pairs kept though their prompt is held out (equal tokens)", f"{quality.leaks:,}", *blank),
        row("distinct responses", lambda s: f"{s.responses:,}"),
        row("responses that also occur in another pair", lambda s: _percent(s.shared_responses)),
        row("responses that contain special tokens", lambda s: f"{s.special_inside:,}"),
        row("chosen is longer, ties count half (95 % interval)", lambda s: interval(s.chosen_longer)),
        row("chosen and rejected equally long", lambda s: "" if s.same_length is None else _percent(s.same_length)),
        row("chosen minus rejected, mean tokens", lambda s: "" if s.difference is None else f"{s.difference:+z.1f}"),
    ]
    if any(sum(side.unpaired) for side in sides):
        rows[1:1] = [
            row("rows of one desirable response, chosen", lambda s: f"{s.unpaired[0]:,}"),
            row("rows of one undesirable response, rejected", lambda s: f"{s.unpaired[1]:,}"),
        ]
    for what, margins in (("scores", _scores), ("truth", _truth)):
        if any(margins(side) for side in sides):
            rows += [
                row(f"{what}: pairs with a value", lambda s, of=margins: f"{m.known:,}" if (m := of(s)) else "0"),
                row(
                    f"{what}: chosen minus rejected, mean",
                    lambda s, of=margins: f"{m.mean:+.3g}" if (m := of(s)) else "",
                ),
                row(f"{what}: median", lambda s, of=margins: f"{m.median:+.3g}" if (m := of(s)) else ""),
                row(
                    f"{what}: contradicts the label", lambda s, of=margins: _percent(m.negative) if (m := of(s)) else ""
                ),
                row(f"{what}: equal", lambda s, of=margins: _percent(m.zero) if (m := of(s)) else ""),
            ]
    return Table("Pairs as labelled for training", ("", *quality.sides), rows)


def _scores(side: Side) -> Margins | None:
    return side.scores


def _truth(side: Side) -> Margins | None:
    return side.truth


def _lengths(quality: Quality) -> Table:
    rows, bars = [], []
    for name, side in quality.sides.items():
        for part in PARTS:
            of = side.lengths[part]
            if part != "prompt" and not side.responses:  # a file of prompts alone
                continue
            figures = (f"{of.mean:.1f}", f"{of.median:.0f}", f"{of.p95:.0f}", f"{of.most:,}", _percent(of.truncated))
            rows.append((f"{name} {part}", *figures))
            bars.append(of.histogram)
    title = f"Tokens (histogram bins: prompts {_width(quality, 'prompt')}, responses {_width(quality, 'response')})"
    return Table(title, ("", "mean", "median", "95 %", "max", "truncated"), rows, bars)


def _noise(quality: Quality) -> Table:
    rows = [
        (f"{kind} as annotated", f"{pairs:,}", f"{flipped:,}", _percent(flipped / pairs) if pairs else "")
        for kind, (pairs, flipped) in quality.noise.flipped.items()
    ]
    total, all_pairs = quality.noise.total, quality.train.pairs
    rows.append(("all training pairs", f"{all_pairs:,}", f"{total:,}", _percent(total / all_pairs)))
    longer = quality.noise.chosen_longer
    before = f" (chosen longer in {interval(longer)} before it)" if longer else ""
    return Table(f"Label noise{before}", ("", "pairs", "flipped", "share"), rows)


def _width(quality: Quality, of: str) -> int:
    return quality.bins[of][1] - quality.bins[of][0]


def interval(estimate: Estimate | None) -> str:
    """Return a share with its interval as text, `12.3 % (10.1 .. 14.5)`; an empty text for none."""
    if estimate is None:
        return ""
    ends = format_interval(estimate.interval or (0.0, 1.0), lambda share: f"{100 * share:.1f}")
    return f"{_percent(estimate.value)} ({ends})"
