"""A report as text: tables on the terminal, as Markdown, and as CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_lab.results import effects
from dpo_lab.results.card import table as markdown_table
from dpo_lab.results.estimates import Estimate
from dpo_lab.results.facts import Collection
from dpo_lab.results.report import numbers
from dpo_lab.results.report.marks import harmless
from dpo_lab.results.stats import Verdict
from dpo_lab.results.study import Prediction

STYLES = {"supported": "bold green", "not supported": "bold red", "inconclusive": "bold yellow"}
ARMS = ("arm", "n", "mean, 95 %", "less baseline, 95 %", "p")
VERDICTS = ("prediction", "verdict", "effect, 95 %", "n", "p", "detectable")


def show(console: Console, collection: Collection, metrics: Sequence[str]) -> None:
    """Print verdicts and arms. All text goes as Text, so that no markup in it is obeyed."""
    _say(console, collection.title, "bold")
    judged = effects.judge(collection) if collection.study else []
    if judged:
        word = effects.overall(judged)
        label = ", exploratory: runs are older than the prediction" if collection.is_exploratory else ""
        _say(console, f"{word}{label}", STYLES.get(word, ""))
        console.print(_table(VERDICTS, [_verdict(*each) for each in judged]))
        for prediction, verdict in judged:
            if verdict.note:
                _say(console, f"  {prediction.says}: {verdict.note}", "yellow")
    for text in collection.unlike:
        _say(console, f"not measured alike, so not to be compared: {text}", "bold red")
    arms = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    _columns(arms, ARMS)
    for metric, measured in numbers.figures(collection, numbers.metrics_of(collection, metrics)).items():
        arms.add_section()
        arms.add_row(Text(metric, "bold"))
        for of in measured:
            arms.add_row(*(Text(harmless(cell)) for cell in _arm(of, collection.baseline)))
    console.print(arms)
    if collection.baseline:
        _say(console, f"baseline: {collection.baseline}; paired by seed, p paid for all arms (Holm)", "dim")
    for run in collection.runs:
        if not run.is_done:
            _say(console, f"{run.title}: {run.status}{f', {run.error}' if run.error else ''}", "red")


def markdown(collection: Collection, metrics: Sequence[str]) -> str:
    """The same as Markdown; no markup in any text is obeyed."""
    lines = [f"## {_inline(collection.title)}", ""]
    if collection.study:
        judged = effects.judge(collection)
        label = ", *exploratory*" if collection.is_exploratory else ""
        lines += [f"**{effects.overall(judged)}**{label}", ""]
        lines += [*markdown_table(VERDICTS, [_told(_verdict(*each)) for each in judged]), ""]
    lines += [f"**Not measured alike:** {_inline(text)}\n" for text in collection.unlike]
    for metric, measured in numbers.figures(collection, numbers.metrics_of(collection, metrics)).items():
        rows = [_told(_arm(of, collection.baseline)) for of in measured]
        lines += [f"### {_inline(metric)}", "", *markdown_table(ARMS, rows), ""]
    absent = [(run.arm, str(run.seed), run.status, run.error or "") for run in collection.runs if not run.is_done]
    if absent:
        rows = [_told(row) for row in absent]
        lines += ["### Cells without a result", "", *markdown_table(("arm", "seed", "status", "error"), rows), ""]
    return "\n".join(lines)


def as_csv(collections: Sequence[Collection], metrics: Sequence[str]) -> str:
    """One row for each metric of each arm, figures as they were computed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("value", "low", "high")
    writer.writerow(["report", "arm", "metric", "n", "runs", *ends, *(f"difference_{end}" for end in ends), "p_holm"])
    for collection in collections:
        for measured in numbers.figures(collection, numbers.metrics_of(collection, metrics)).values():
            for of in measured:
                figures = [*_ends(of.estimate), *_ends(of.difference), "" if of.p is None else repr(of.p)]
                texts = map(_plain_cell, (collection.title, of.arm, of.metric))
                writer.writerow([*texts, of.n, of.planned, *figures])
    return out.getvalue()


def _plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _ends(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["", "", ""]
    return [repr(float(v)) if v is not None else "" for v in (estimate.value, *(estimate.interval or (None, None)))]


def _arm(of: numbers.Measured, baseline: str | None) -> list[str]:
    if of.estimate is None:
        return [of.arm, numbers.count_text(of), "not measured", "", ""]
    level = numbers.with_error(of.estimate)
    if of.difference is None:
        return [of.arm, numbers.count_text(of), level, "baseline" if of.arm == baseline else "", ""]
    return [
        of.arm,
        numbers.count_text(of),
        level,
        numbers.with_error(of.difference, numbers.signed),
        numbers.p_text(of.p),
    ]


def _verdict(prediction: Prediction, verdict: Verdict) -> list[str]:
    told = numbers.with_error(verdict.effect, numbers.signed) if verdict.effect else ""
    says = prediction.says if prediction.primary else f"{prediction.says} (secondary)"
    p = verdict.p_holm if verdict.p_holm is not None else verdict.p
    can_see = numbers.spelled(verdict.detectable) if verdict.detectable is not None else ""
    return [says, verdict.word, told, str(len(verdict.seeds)), numbers.p_text(p), can_see]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    _columns(table, head)
    for row in rows:
        table.add_row(*(Text(harmless(cell), STYLES.get(cell, "")) for cell in row))
    return table


def _columns(table: Table, head: Sequence[str]) -> None:
    for number, name in enumerate(head):
        is_first = number == 0
        least = 12 if is_first else None
        table.add_column(name, justify="left" if is_first else "right", overflow="fold", min_width=least)


def _told(cells: Sequence[str]) -> list[str]:
    return [harmless(cell) for cell in cells]


def _inline(text: str) -> str:
    """Text of one line, in which no Markdown is obeyed."""
    from dpo_lab.results.card import cell

    return cell(harmless(text)).replace("#", "&#35;") if text.startswith("#") else cell(harmless(text))


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(harmless(line), style), soft_wrap=True, highlight=False)
