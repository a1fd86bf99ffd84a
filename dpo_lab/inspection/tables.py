"""The tables of an inspection as plain cells, for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.data.quality import PARTS, Margins, Quality, Side
from dpo_lab.inspection.look import Inspection
from dpo_lab.stats.estimates import Estimate

USUAL = (
    "bad row",
    "duplicate",
    "identical sides",
    "identical after truncation",
)  # why rows are dropped, shown when none is
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row. bars: a histogram a row, or none."""

    title: str
    head: Cells
    rows: list[Cells]
    bars: list[list[int]] | None = None


def tables(look: Inspection) -> list[Table]:
    quality = look.quality
    given = [_counts(quality), _findings(quality), _lengths(quality)]
    return [*given, *([_noise(quality)] if quality.noise.total else [])]


def _counts(quality: Quality) -> Table:
    rows = quality.counts.get("rows", 0)
    counts = {what: count for what, count in quality.counts.items() if count}
    counts |= {f"dropped: {reason}": 0 for reason in USUAL if f"dropped: {reason}" not in counts}
    return Table(
        "Rows, and what became of them",
        ("", "count", "of rows"),
        [
            (what, f"{count:,}", share(count / rows) if rows and what != "rows" else "")
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
        row("repeated pairs (as tokens)", lambda s: f"{s.repeated:,}"),
        row("contradictions, A > B and B > A (as tokens)", lambda s: f"{s.contradictions:,}"),
        ("rows left out, their prompt is held out", f"{quality.leaks_dropped:,}", *blank),
        ("pairs left whose prompt is held out (as tokens)", f"{quality.leaks:,}", *blank),
        row("distinct responses", lambda s: f"{s.responses:,}"),
        row("responses that stand in another pair too", lambda s: share(s.shared_responses)),
        row("responses with special tokens inside", lambda s: f"{s.special_inside:,}"),
        row("chosen is longer, a tie half (95 % interval)", lambda s: interval(s.chosen_longer)),
        row("chosen is as long as rejected", lambda s: share(s.same_length)),
        row("chosen less rejected, mean tokens", lambda s: f"{s.difference:+z.1f}"),
    ]
    for what, margins in (("scores", _scores), ("truth", _truth)):
        if any(margins(side) for side in sides):
            rows += [
                row(f"{what}: pairs where known", lambda s, of=margins: f"{m.known:,}" if (m := of(s)) else "0"),
                row(
                    f"{what}: chosen less rejected, mean",
                    lambda s, of=margins: f"{m.mean:+.3g}" if (m := of(s)) else "",
                ),
                row(f"{what}: median", lambda s, of=margins: f"{m.median:+.3g}" if (m := of(s)) else ""),
                row(f"{what}: against the label", lambda s, of=margins: share(m.negative) if (m := of(s)) else ""),
                row(f"{what}: equal", lambda s, of=margins: share(m.zero) if (m := of(s)) else ""),
            ]
    return Table("Pairs, as labelled for training", ("", *quality.sides), rows)


def _scores(side: Side) -> Margins | None:
    return side.scores


def _truth(side: Side) -> Margins | None:
    return side.truth


def _lengths(quality: Quality) -> Table:
    rows, bars = [], []
    for name, side in quality.sides.items():
        for part in PARTS:
            of = side.lengths[part]
            figures = (f"{of.mean:.1f}", f"{of.median:.0f}", f"{of.p95:.0f}", f"{of.most:,}", share(of.truncated))
            rows.append((f"{name} {part}", *figures))
            bars.append(of.histogram)
    title = (
        f"Tokens (histograms: prompts in steps of {_width(quality, 'prompt')}, responses in steps of"
        f" {_width(quality, 'response')})"
    )
    return Table(title, ("", "mean", "median", "95 %", "most", "cut"), rows, bars)


def _noise(quality: Quality) -> Table:
    rows = [
        (f"{kind} as annotated", f"{pairs:,}", f"{flipped:,}", share(flipped / pairs) if pairs else "")
        for kind, (pairs, flipped) in quality.noise.flipped.items()
    ]
    total, all_pairs = quality.noise.total, quality.train.pairs
    rows.append(("all training pairs", f"{all_pairs:,}", f"{total:,}", share(total / all_pairs)))
    before = f"Label noise (chosen was longer in {interval(quality.noise.chosen_longer)} before it)"
    return Table(before, ("", "pairs", "flipped", "share"), rows)


def _width(quality: Quality, of: str) -> int:
    return quality.bins[of][1] - quality.bins[of][0]


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(estimate: Estimate) -> str:
    low, high = estimate.interval or (0.0, 1.0)
    return f"{100 * estimate.value:.1f} % ({100 * low:.1f} .. {100 * high:.1f})"
