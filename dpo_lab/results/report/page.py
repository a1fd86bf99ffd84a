"""The page of a report: one file that loads nothing, verdict first, for one collection or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.results import effects
from dpo_lab.results.facts import Collection, RunFacts
from dpo_lab.results.journal import JournalError
from dpo_lab.results.report import figures, numbers, tables
from dpo_lab.results.report.lines import Drawing
from dpo_lab.results.report.marks import harmless
from dpo_lab.results.report.rows import effect
from dpo_lab.results.report.samples import Prompt, side_by_side
from dpo_lab.results.report.tables import Table
from dpo_lab.results.stats import Verdict
from dpo_lab.results.study import Direction, Prediction
from dpo_lab.results.webpage import document

MADE_BY = "dpo_lab.report"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """A prediction and what came of it, in words and as a picture."""

    says: str
    word: str
    is_primary: bool
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    picture: str


@dataclass(frozen=True)
class Part:
    """All that a page shows of one collection. word: the verdict, if it is a study's; chips: short labels beside it."""

    title: str
    word: str
    chips: Sequence[str]
    about: Sequence[tuple[str, str]]
    found: Sequence[str]
    answers: Sequence[Answer]
    asked: Sequence[Drawing]
    frontier: Drawing | None
    curves: Drawing | None
    curves_note: str
    arms: Table
    seed: int | None
    prompts: Sequence[Prompt]
    counts: Table | None
    noise: Table | None
    health: Table
    absent: Table
    command: str
    overrides: Sequence[str]
    commands: Table
    provenance: Table


def page(collections: Sequence[Collection], folder: Path, metrics: Sequence[str] = ()) -> str:
    """The whole page. folder: where it will lie, paths in it are from there. The same for the same run folders."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def plain(value: Any) -> Any:
        return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
    )

    def breakable(text: str) -> Markup:
        """A name that may go on in the next line where its words meet."""
        return Markup(str(escape(plain(text))).replace("_", "_<wbr>").replace("/", "/<wbr>"))

    environment.filters["breakable"] = breakable
    environment.filters["svg"] = Markup  # of our own drawings alone, whose text is escaped
    parts = [_part(collection, folder, metrics) for collection in collections]
    body = environment.get_template("page.html").render(parts=parts)
    title = harmless(", ".join(part.title for part in parts))
    return document(title, MADE_BY, body, (HERE / "style.css").read_text(), (HERE / "script.js").read_text())


def _part(collection: Collection, folder: Path, asked: Sequence[str]) -> Part:
    study, record = collection.study, collection.record
    metrics = numbers.metrics_of(collection, asked)
    judged = effects.judge(collection) if study else []
    journals = _Journals(collection.runs)
    curves = figures.learning(collection, journals)
    shown = side_by_side(collection)
    return Part(
        title=collection.title,
        word=effects.overall(judged) if judged else "",
        chips=_chips(collection),
        about=[*_about(collection), *(("not measured alike", text) for text in collection.unlike)],
        found=[each for each in (study.found if study else "").split("\n\n") if each.strip()],
        answers=[_answer(prediction, verdict) for prediction, verdict in judged],
        asked=figures.asked(collection, metrics, journals),
        frontier=figures.plane(collection),
        curves=curves,
        curves_note=journals.note or ("" if curves else "No journal lies beside these runs."),
        arms=tables.arms_table(collection, numbers.figures(collection, metrics)),
        seed=shown[0] if shown else None,
        prompts=shown[1] if shown else [],
        counts=tables.counts_table(collection),
        noise=tables.noise_table(collection),
        health=tables.health_table(collection),
        absent=tables.absent_table(collection, folder),
        command=str(record.get("command", "")),
        overrides=[str(each) for each in record.get("overrides", ())],
        commands=tables.commands_table(collection),
        provenance=tables.provenance_table(collection),
    )


def _chips(collection: Collection) -> list[str]:
    record = collection.record
    chips = ["exploratory"] if collection.is_exploratory else []
    chips += ["not measured alike"] if collection.unlike else []
    if record.get("budget"):
        chips.append(f"budget {record['budget']}")
    if record.get("status") not in (None, "done"):
        chips.append(f"study {record['status']}")
    done = sum(run.is_done for run in collection.runs)
    return [*chips, f"{done} of {len(collection.runs)} runs done"]


def _about(collection: Collection) -> list[tuple[str, str]]:
    """What was asked, and when what was predicted."""
    study = collection.study
    if study is None:
        return [("runs of", collection.title), ("baseline", collection.baseline or "none; type --baseline ARM")]
    since, others = numbers.registered(collection.record, study.digest())
    when = since or "never: this is not what was registered"
    if others:
        when += f"; {others} other version{'s' if others > 1 else ''} before"
    about = [("question", study.question), ("claim", study.claim), ("source", study.source), ("registered", when)]
    if collection.is_exploratory:
        early = [run for run in collection.runs if run.is_done and not run.is_own]
        arms = dict.fromkeys(run.arm for run in early)
        told = f": {'; '.join(arms)}" if len(arms) <= 4 else ""
        about.append(("exploratory", f"{len(early)} runs were begun before this prediction stood{told}"))
    return [(name, text) for name, text in about if text]


def _answer(prediction: Prediction, verdict: Verdict) -> Answer:
    """Effects are told as they were measured: a `less` that holds lies below 0."""
    measured = verdict.effect
    facts = [
        ("effect", numbers.interval_text(measured, numbers.signed) if measured else "not known"),
        ("of", numbers.effect_name(prediction)),
        ("predicted", numbers.predicted(prediction)),
        ("n", f"{len(verdict.seeds)} seeds"),
        ("p", numbers.p_text(verdict.p)),
        ("p, Holm", numbers.p_text(verdict.p_holm)),
        ("detectable", numbers.spelled(verdict.detectable) if verdict.detectable is not None else ""),
    ]
    picture = ""
    if measured:
        sign = -1 if prediction.direction is Direction.less else 1
        says = f"effect {numbers.interval_text(measured, numbers.signed)}; predicted {numbers.predicted(prediction)}"
        is_same = prediction.direction is Direction.same
        picture = effect(measured.value, measured.interval, sign * prediction.at_least, says, both=is_same)
    notes = numbers.verdict_notes(verdict)
    return Answer(prediction.says, verdict.word, prediction.primary, [f for f in facts if f[1]], notes, picture)


class _Journals:
    """The journals of an arm's runs, read once: of those that are done, or of all where none is."""

    def __init__(self, runs: Sequence[RunFacts]) -> None:
        self._runs, self._read, self.note = runs, {}, ""

    def __call__(self, arm: str) -> Sequence[tuple[int, Sequence[Mapping[str, Any]]]]:
        if arm not in self._read:
            runs = [run for run in self._runs if run.arm == arm]
            self._read[arm] = [(run.seed, self._rows(run)) for run in [r for r in runs if r.is_done] or runs]
        return self._read[arm]

    def _rows(self, run: RunFacts) -> list[dict[str, Any]]:
        try:
            return run.journal()
        except JournalError as error:
            self.note = f"A journal can't be read: {error}"
            return []
