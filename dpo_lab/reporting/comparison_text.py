"""A comparison as text: tables for the terminal, Markdown, and CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_lab.reporting import comparison
from dpo_lab.reporting.figures.markers import strip_control
from dpo_lab.reporting.model_card import markdown_table as markdown_table
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.studies import verdicts
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.spec import Prediction

STYLES = {"supported": "bold green", "not supported": "bold red", "inconclusive": "bold yellow"}
ARMS = ("arm", "n", "mean, 95 %", "less baseline, 95 %", "p")
VERDICTS = ("prediction", "verdict", "effect, 95 %", "n", "p", "detectable")


def show(console: Console, collection: RunSet, metrics: Sequence[str]) -> None:
    """Print verdicts and arms. All text goes as Text, so that no markup in it is obeyed."""
    _say(console, collection.title, "bold")
    judged = verdicts.decide(collection) if collection.study else []
    if judged:
        word = verdicts.study_verdict(judged)
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
    for metric, measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).items():
        arms.add_section()
        arms.add_row(Text(metric, "bold"))
        for of in measured:
            arms.add_row(*(Text(strip_control(cell)) for cell in _arm(of, collection.baseline)))
    console.print(arms)
    if collection.baseline:
        _say(console, f"baseline: {collection.baseline}; paired by seed, p paid for all arms (Holm)", "dim")
    for run in collection.runs:
        if not run.is_done:
            _say(console, f"{run.title}: {run.status}{f', {run.error}' if run.error else ''}", "red")


def markdown(collection: RunSet, metrics: Sequence[str]) -> str:
    """The same as Markdown; no markup in any text is obeyed."""
    lines = [f"## {_inline(collection.title)}", ""]
    if collection.study:
        judged = verdicts.decide(collection)
        label = ", *exploratory*" if collection.is_exploratory else ""
        lines += [f"**{verdicts.study_verdict(judged)}**{label}", ""]
        lines += [*markdown_table(VERDICTS, [_told(_verdict(*each)) for each in judged]), ""]
    lines += [f"**Not measured alike:** {_inline(text)}\n" for text in collection.unlike]
    for metric, measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).items():
        rows = [_told(_arm(of, collection.baseline)) for of in measured]
        lines += [f"### {_inline(metric)}", "", *markdown_table(ARMS, rows), ""]
    absent = [(run.arm, str(run.seed), run.status, run.error or "") for run in collection.runs if not run.is_done]
    if absent:
        rows = [_told(row) for row in absent]
        lines += ["### Cells without a result", "", *markdown_table(("arm", "seed", "status", "error"), rows), ""]
    return "\n".join(lines)


def as_csv(collections: Sequence[RunSet], metrics: Sequence[str]) -> str:
    """One row for each metric of each arm, figures as they were computed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("value", "low", "high")
    writer.writerow(["report", "arm", "metric", "n", "runs", *ends, *(f"difference_{end}" for end in ends), "p_holm"])
    for collection in collections:
        for measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).values():
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


def _arm(of: comparison.Measured, baseline: str | None) -> list[str]:
    if of.estimate is None:
        return [of.arm, comparison.count_text(of), "not measured", "", ""]
    level = comparison.with_error(of.estimate)
    if of.difference is None:
        return [of.arm, comparison.count_text(of), level, "baseline" if of.arm == baseline else "", ""]
    return [
        of.arm,
        comparison.count_text(of),
        level,
        comparison.with_error(of.difference, comparison.signed),
        comparison.p_text(of.p),
    ]


def _verdict(prediction: Prediction, verdict: Verdict) -> list[str]:
    told = comparison.with_error(verdict.effect, comparison.signed) if verdict.effect else ""
    says = prediction.says if prediction.primary else f"{prediction.says} (secondary)"
    p = verdict.p_holm if verdict.p_holm is not None else verdict.p
    can_see = comparison.format_value(verdict.detectable) if verdict.detectable is not None else ""
    return [says, verdict.word, told, str(len(verdict.seeds)), comparison.p_text(p), can_see]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    _columns(table, head)
    for row in rows:
        table.add_row(*(Text(strip_control(cell), STYLES.get(cell, "")) for cell in row))
    return table


def _columns(table: Table, head: Sequence[str]) -> None:
    for number, name in enumerate(head):
        is_first = number == 0
        least = 12 if is_first else None
        table.add_column(name, justify="left" if is_first else "right", overflow="fold", min_width=least)


def _told(cells: Sequence[str]) -> list[str]:
    return [strip_control(cell) for cell in cells]


def _inline(text: str) -> str:
    """Text of one line, in which no Markdown is obeyed."""
    from dpo_lab.reporting.model_card import cell

    return cell(strip_control(text)).replace("#", "&#35;") if text.startswith("#") else cell(strip_control(text))


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(strip_control(line), style), soft_wrap=True, highlight=False)
