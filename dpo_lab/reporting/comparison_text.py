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
from dpo_lab.reporting.formatting import strip_control
from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.stats.text import format_p
from dpo_lab.studies import verdicts
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.spec import Prediction

STYLES = {"supported": "bold green", "not supported": "bold red", "inconclusive": "bold yellow"}
ARMS = ("arm", "n", "mean, 95 %", "difference to baseline, 95 %", "p, Holm")
VERDICTS = ("prediction", "verdict", "effect, 95 %", "n", "p", "detectable", "interval")


def show(console: Console, collection: RunSet, metrics: Sequence[str]) -> None:
    """Print verdicts and arms to the terminal; markup in texts is not interpreted."""
    _print(console, collection.title, "bold")
    if collection.shared:
        _print(console, f"all runs: {' '.join(collection.shared)}")
    judged = verdicts.decide(collection) if collection.study else []
    if judged:
        word = verdicts.study_verdict(judged)
        label = (
            ", exploratory: some runs started before the prediction was registered" if collection.is_exploratory else ""
        )
        _print(console, f"{word}{label}", STYLES.get(word, ""))
        _print(console, verdicts.claims_text(judged))
        columns = dict(zip(VERDICTS, zip(*(_verdict(*each) for each in judged), strict=True), strict=True))
        kinds = set(columns["interval"])
        if len(kinds) == 1:  # 80 columns have no room for one of equal words
            del columns["interval"]
        if not any(columns["detectable"]):
            del columns["detectable"]
        console.print(_table([*columns], [*zip(*columns.values(), strict=True)]))
        if len(kinds) == 1:
            _print(console, f"intervals: {kinds.pop()}", "dim")
        for prediction, verdict in judged:
            if verdict.note:
                _print(console, f"  {prediction.description}: {verdict.note}", "yellow")
    for text in collection.incomparable_settings:
        _print(console, f"measured with different settings, not comparable: {text}", "bold red")
    arms = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    _columns(arms, ARMS)
    for metric, measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).items():
        arms.add_section()
        arms.add_row(Text(metric, "bold"))
        for of in measured:
            arms.add_row(*(Text(strip_control(cell)) for cell in _arm(of, collection.baseline)))
    console.print(arms)
    if collection.baseline or len(collection.arms) > 1:
        paired = "; paired by seed, p values Holm-corrected over arms" if collection.baseline else ""
        _print(console, f"baseline: {comparison.baseline_text(collection)}{paired}", "dim")
    for run in collection.runs:
        if not run.is_done:
            _print(console, f"{run.title}: {run.status}{f', {run.error}' if run.error else ''}", "red")


def markdown(collection: RunSet, metrics: Sequence[str]) -> str:
    """Return the same as Markdown, with markup in texts escaped."""
    lines = [f"## {_inline(collection.title)}", ""]
    if collection.study:
        judged = verdicts.decide(collection)
        label = ", *exploratory*" if collection.is_exploratory else ""
        lines += [f"**{verdicts.study_verdict(judged)}**{label}: {verdicts.claims_text(judged)}", ""]
        lines += [*markdown_table(VERDICTS, [_strip(_verdict(*each)) for each in judged]), ""]
    elif len(collection.arms) > 1:
        about = [("All runs", " ".join(collection.shared)), ("Baseline", comparison.baseline_text(collection))]
        lines += [f"{name}: {_inline(text)}\n" for name, text in about if text]
    lines += [f"**Measured with different settings:** {_inline(text)}\n" for text in collection.incomparable_settings]
    for metric, measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).items():
        rows = [_strip(_arm(of, collection.baseline)) for of in measured]
        lines += [f"### {_inline(metric)}", "", *markdown_table(ARMS, rows), ""]
    absent = [(run.arm, str(run.seed), run.status, run.error or "") for run in collection.runs if not run.is_done]
    if absent:
        rows = [_strip(row) for row in absent]
        lines += ["### Runs without a result", "", *markdown_table(("arm", "seed", "status", "error"), rows), ""]
    return "\n".join(lines)


def as_csv(collections: Sequence[RunSet], metrics: Sequence[str]) -> str:
    """Return CSV with a row per metric and arm, numbers with every digit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("value", "low", "high")
    writer.writerow(
        ["report", "arm", "metric", "n", "runs", *ends, *(f"difference_{end}" for end in ends), "p_holm", "scale"]
    )
    for collection in collections:
        for measured in comparison.figures(collection, comparison.metrics_of(collection, metrics)).values():
            for of in measured:
                figures = [*_bounds(of.estimate), *_bounds(of.difference), "" if of.p is None else repr(of.p)]
                texts = map(_plain_cell, (collection.title, of.arm, of.metric))
                writer.writerow([*texts, of.n, of.planned, *figures, of.scale.value])
    return out.getvalue()


def _plain_cell(text: str) -> str:
    """Return text that no spreadsheet reads as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _bounds(estimate: Estimate | None) -> list[str]:
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
        comparison.told_difference(of, comparison.with_error),
        format_p(of.p),
    ]


def _verdict(prediction: Prediction, verdict: Verdict) -> list[str]:
    effect = comparison.effect_text(verdict.effect, prediction.scale, comparison.with_error) if verdict.effect else ""
    says = prediction.description if prediction.primary else f"{prediction.description} (secondary)"
    p = verdict.p_holm if verdict.p_holm is not None else verdict.p
    detectable = comparison.detectable_text(prediction, verdict)
    return [says, verdict.word, effect, str(len(verdict.seeds)), format_p(p), detectable, verdict.interval_kind]


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


def _strip(cells: Sequence[str]) -> list[str]:
    return [strip_control(cell) for cell in cells]


def _inline(text: str) -> str:
    """Return text on one line with Markdown escaped."""
    from dpo_lab.reporting.model_card import cell

    return cell(strip_control(text)).replace("#", "&#35;") if text.startswith("#") else cell(strip_control(text))


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(strip_control(line), style), soft_wrap=True, highlight=False)
