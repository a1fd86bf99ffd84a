"""The HTML page of a comparison: one offline file, verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.reporting import comparison, comparison_tables, forest
from dpo_lab.reporting.comparison_tables import Table
from dpo_lab.reporting.figures import comparison_figures, trajectory
from dpo_lab.reporting.figures.charts import Chart, Panel, Point, Series, chart
from dpo_lab.reporting.figures.looks import looks_figure
from dpo_lab.reporting.figures.reward_kl import reward_against_kl
from dpo_lab.reporting.html_page import render
from dpo_lab.reporting.samples import Prompt, side_by_side
from dpo_lab.runs.examples import ExamplesError
from dpo_lab.runs.metrics_log import MetricsLogError
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.stats.text import format_p, percent
from dpo_lab.studies import verdicts
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.scales import Scale, as_told, factor
from dpo_lab.studies.spec import Direction, Prediction

MADE_BY = "dpo_lab.report"
STYLES = ("templates/comparison.css", "templates/forest.css")
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "templates/charts.js", "templates/tables.js")
# The style sheet that Observable Plot inserts into every chart whose class name is "chart"; the same text allows it.
PLOT_STYLE = """:where(.chart) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.chart text),
:where(.chart tspan) {
  white-space: pre;
}"""


@dataclass(frozen=True)
class Answer:
    """A prediction and its verdict, with facts, notes and a chart of the effect."""

    says: str
    word: str
    is_primary: bool
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    effect: Chart | None


@dataclass(frozen=True)
class Part:
    """What the page shows of one set of runs. word: the verdict if it is a study; chips: short labels beside it."""

    title: str
    word: str
    chips: Sequence[str]
    about: Sequence[tuple[str, str]]
    found: Sequence[str]
    claims: Sequence[forest.Claim]
    answers: Sequence[Answer]
    looks: Chart | None
    asked: Sequence[Chart]
    frontier: Chart | None
    paths: Sequence[Chart]
    curves: Chart | None
    curves_note: str
    arms: Table
    seed: int | None
    prompts: Sequence[Prompt]
    examples_note: str
    counts: Table | None
    noise: Table | None
    health: Table
    absent: Table
    command: str
    overrides: Sequence[str]
    commands: Table
    provenance: Table


def page(collections: Sequence[RunSet], folder: Path, metrics: Sequence[str] = ()) -> str:
    """Return the HTML page; the same runs give the same page. folder: where it is written; links are relative to it."""
    parts = [_part(collection, folder, metrics) for collection in collections]
    title = ", ".join(part.title for part in parts)
    return render("comparison.html", MADE_BY, STYLES, SCRIPTS, PLOT_STYLE, title=title, parts=parts, plot=forest.PLOT)


def _part(collection: RunSet, folder: Path, asked: Sequence[str]) -> Part:
    study, record = collection.study, collection.record
    metrics = comparison.metrics_of(collection, asked)
    judged = verdicts.decide(collection) if study else []
    logs = _MetricsLogs(collection.runs)
    curves = comparison_figures.learning(collection, logs)
    notes: list[str] = []
    shown = side_by_side(collection, notes)
    answers = [_answer(prediction, verdict, collection, notes) for prediction, verdict in judged]
    return Part(
        title=collection.title,
        word=verdicts.study_verdict(judged) if judged else "",
        chips=[*([verdicts.claims_text(judged)] if judged else []), *_chips(collection)],
        about=[
            *_about(collection),
            *(("measured with different settings", text) for text in collection.incomparable_settings),
        ],
        found=[each for each in (study.notes if study else "").split("\n\n") if each.strip()],
        claims=forest.claims(judged),
        answers=answers,
        looks=looks_figure(collection),
        asked=comparison_figures.study_figures(collection, metrics, logs),
        paths=trajectory.paths(collection),
        frontier=reward_against_kl(collection, collection.arms),
        curves=curves,
        curves_note=logs.note or ("" if curves else "These runs have no metrics log."),
        arms=comparison_tables.arms_table(collection, comparison.figures(collection, metrics)),
        seed=shown[0] if shown else None,
        prompts=shown[1] if shown else [],
        examples_note=f"Values per example can't be read: {'; '.join(dict.fromkeys(notes))}" if notes else "",
        counts=comparison_tables.counts_table(collection),
        noise=comparison_tables.noise_table(collection),
        health=comparison_tables.health_table(collection),
        absent=comparison_tables.absent_table(collection, folder),
        command=str(record.get("command", "")),
        overrides=[str(each) for each in record.get("overrides", ())],
        commands=comparison_tables.commands_table(collection),
        provenance=comparison_tables.provenance_table(collection),
    )


def _chips(collection: RunSet) -> list[str]:
    record = collection.record
    chips = ["exploratory"] if collection.is_exploratory else []
    chips += ["measured with different settings"] if collection.incomparable_settings else []
    if record.get("budget"):
        chips.append(f"budget {record['budget']}")
    if rule := record.get("stopping"):
        arms = f"; arms of decided claims stop after {rule['all_arms']} or more" if "all_arms" in rule else ""
        chips.append(f"seeds added until decided, at most {rule['max_seeds']}{arms}")
    if record.get("status") not in (None, "done"):
        chips.append(f"study {record['status']}")
    done = sum(run.is_done for run in collection.runs)
    return [*chips, f"{done} of {len(collection.runs)} runs done"]


def _about(collection: RunSet) -> list[tuple[str, str]]:
    """Return question, claim and source, and when the predictions were registered."""
    study, record = collection.study, collection.record
    if study is None:
        about = [("runs in", collection.title), ("all runs", " ".join(collection.shared))]
        return [each for each in (*about, ("baseline", comparison.baseline_text(collection))) if each[1]]
    since, others = comparison.registered(record, study.digest(record.get("stopping")))
    when = since or "never: these predictions differ from the registered ones"
    if others:
        when += f"; {others} other version{'s' if others > 1 else ''} registered before"
    about = [("question", study.question), ("claim", study.claim), ("source", study.source)]
    about += [("known before", study.known), ("registered", when)]
    if collection.is_exploratory:
        early = [run for run in collection.runs if run.is_done and not run.is_confirmatory]
        arms = dict.fromkeys(run.arm for run in early)
        names = f": {'; '.join(arms)}" if len(arms) <= 4 else ""
        about.append(("exploratory", f"{len(early)} runs started before these predictions were registered{names}"))
    return [(name, text) for name, text in about if text]


def _answer(prediction: Prediction, verdict: Verdict, collection: RunSet, notes: list[str]) -> Answer:
    """Return a prediction with its verdict. Effects keep their sign: a supported `less` lies below 0.

    notes: errors of examples that can't be read are added to it.
    """
    measured, share = verdict.effect, None
    try:
        share = verdicts.share_from_prompts(prediction, collection)
    except ExamplesError as error:
        notes.append(str(error))
    facts = [
        ("effect", comparison.effect_text(measured, prediction.scale) if measured else "unknown"),
        ("effect of", comparison.effect_name(prediction)),
        ("predicted", comparison.predicted(prediction)),
        ("n", f"{len(verdict.seeds)} seeds"),
        ("p", format_p(verdict.p)),
        ("p, Holm", format_p(verdict.p_holm)),
        ("detectable", comparison.detectable_text(prediction, verdict)),
        ("interval", verdict.interval_kind),
        ("spread from prompts", percent(share) + " of the variance between seeds" if share is not None else ""),
    ]
    return Answer(
        prediction.description,
        verdict.word,
        prediction.primary,
        [f for f in facts if f[1]],
        comparison.verdict_notes(verdict),
        _effect(prediction, measured),
    )


def _effect(prediction: Prediction, measured: Estimate | None) -> Chart | None:
    """Return the effect with its interval, no effect, and the smallest relevant one, on both sides if `same` was predicted;
    factors on a log axis.
    """
    if measured is None:
        return None
    scale = prediction.scale
    tip = f"effect {comparison.effect_text(measured, scale)}; predicted {comparison.predicted(prediction)}"
    told = as_told(scale, measured)
    point = Point(told.value, "", tip, x_interval=told.interval)
    signs = {Direction.less: (-1,), Direction.more: (1,), Direction.same: (-1, 1)}[prediction.direction]
    dashed = [sign * prediction.least for sign in signs if prediction.least]
    series, axis, none = [Series("effect", [point], is_line=False)], "linear", 0.0
    if scale is not Scale.plain:
        axis, none, dashed = "log", 1.0, [factor(value) for value in dashed]
    return chart("", [Panel("", "", series, x=axis, lines=[none], dashed=dashed, rows=[""])])


class _MetricsLogs:
    """The metrics logs of an arm's runs, read once: of finished runs, or of all if none is finished."""

    def __init__(self, runs: Sequence[RunData]) -> None:
        self._runs, self._read, self.note = runs, {}, ""

    def __call__(self, arm: str) -> Sequence[tuple[int, Sequence[Mapping[str, Any]]]]:
        if arm not in self._read:
            runs = [run for run in self._runs if run.arm == arm]
            self._read[arm] = [(run.seed, self._rows(run)) for run in [r for r in runs if r.is_done] or runs]
        return self._read[arm]

    def _rows(self, run: RunData) -> list[dict[str, Any]]:
        try:
            return run.log_rows()
        except MetricsLogError as error:
            self.note = f"A metrics log can't be read: {error}"
            return []
