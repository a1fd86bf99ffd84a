"""Write `ablations/RESULTS.md`: every archived study's predictions, verdicts, arms and cost, from its record alone."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_lab.reporting.comparison import detectable_text
from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.stats import paired_tests
from dpo_lab.stats.text import format_estimate, format_interval, format_p
from dpo_lab.studies import archive, frontier, verdicts
from dpo_lab.studies.run_data import NotMeasured, RunSet
from dpo_lab.studies.scales import Scale, as_told, prefix
from dpo_lab.studies.spec import Direction, Prediction, StudyError
from dpo_lab.studies.verdicts import ANYTIME

EXPLORATORY = "exploratory"
HEAD = """# Results

Every number here is computed from the archived records of runs, `ablations/records/*.json`, by `python -m
dpo_lab.report --results ablations/RESULTS.md`; with `--check` the same command shows where this file differs from the
records. Negative results are included.

n is the number of seeds. An effect is computed for each seed, between runs that share data, order and prompts; its 95 %
interval is Student's t over seeds (Clopper-Pearson for yes/no metrics), or anytime-valid where seeds were added until
the study was decided. Effects on KL, perplexity and other ratio quantities are factors (x), unless they were registered
as differences ([docs/statistics.md](../docs/statistics.md)). p is two-sided and Holm-corrected over the
study's primary predictions (for a secondary prediction, over all). *Supported*: the effect has the predicted sign, p is
below .05, and the effect is at least the smallest relevant one. *Not supported*: the interval excludes every relevant
effect. *Inconclusive*: neither; `detectable` is the effect that this number of seeds detects at power 0.8.
*Exploratory*: some runs started before the prediction was registered.
"""
ARMS = (
    "Means over seeds with 95 % intervals, of KL, perplexity and other ratio quantities geometric means; below each the"
    " difference to {baseline}, or the factor (x), paired by seed, with `*` if its p, Holm-corrected over arms, is below"
    " .05."
)
AREA = (
    "Area under the frontier of gain against KL, from 0 to {kl_max:g} nats, as a share of the optimum's area. The optimum is"
    " estimated by exponentially tilting samples of the initial policy. {line}"
)


def write_results(records: Path, path: Path) -> None:
    """Write the results of all records in a folder. Raises StudyError if one can't be read, or there is none."""
    write_atomic(path, results(_read(records)))


def check_results(records: Path, path: Path) -> list[str]:
    """Return the lines in which a results file differs from its records: `-` in the file, `+` from the records.

    Raises StudyError if the file does not exist, or a record can't be read.
    """
    if not path.is_file():
        raise StudyError(f"{path}: no such file; type the same command without --check to write it")
    written, expected = path.read_text(encoding="utf-8").splitlines(), results(_read(records)).splitlines()
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, written, expected, autojunk=False).get_opcodes():
        if tag != "equal":
            found += [f"{path}:{number + 1}: - {written[number]}" for number in range(a, b)]
            found += [f"{path}:{a + 1}: + {expected[number]}" for number in range(c, d)]
    return found


def results(studies: Sequence[RunSet]) -> str:
    """Return the text of the results file; the same records give the same bytes."""
    judged = [(study, verdicts.decide(study)) for study in studies]
    rows, seconds = [], {}
    for study, found in judged:
        done = (run for run in study.runs if run.is_done and run.record.get("seconds"))
        seconds |= {run.folder: run.value("seconds") for run in done}
        rows.append(
            (
                _title(study),
                _word(study, found),
                date(study),
                str(len(study.seeds)),
                _hours(study.cpu_seconds()),
                verdicts.claims_text(found),
            )
        )
    total = (
        f"All studies took {_hours(math.fsum(seconds.values()))} of CPU time; a run shared by several is counted once."
    )
    index = markdown_table(("study", "verdict", "date", "seeds", "CPU", "claims"), rows, _escape)
    sections = [line for study, found in judged for line in ["", *_section(study, found)]]
    return "\n".join([HEAD, *index, "", total, *sections]) + "\n"


def date(study: RunSet) -> str:
    """Return the day on which a study's last run started."""
    days = [str(run.record.get("started") or "")[:10] for run in study.runs]
    return max(days, default="") or "not run"


def format_number(value: float) -> str:
    """Return a number as text with three significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1g}"
    return "0" if float(text) == 0 else text


def _read(records: Path) -> list[RunSet]:
    found = [archive.read(path) for path in sorted(records.glob("*.json"), key=lambda path: path.stem)]
    if not found:
        raise StudyError(f"{records}: holds no archived record; archive a study first, with --archive {records}")
    return found


def _title(study: RunSet) -> str:
    """Return a study's title, with its budget if that is not `full`."""
    budget = study.record.get("budget")
    return study.title if budget in ("full", None) else f"{study.title} (budget {budget})"


def _section(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    study, record = collection.study, collection.record
    assert study is not None
    commits = sorted({_commit(run.record["git"]) for run in collection.runs if run.record.get("git")})
    facts = [
        f"{date(collection)}, budget {record.get('budget') or 'full'}, {len(collection.seeds)} seeds",
        f"{_hours(collection.cpu_seconds())} of CPU time",
        *([f"commit {', '.join(commits)}"] if commits else []),
    ]
    parts = [
        f"## {_escape(_title(collection))}",
        "",
        *([f"    {record['command']}", ""] if record.get("command") else []),
        f"{'; '.join(facts)}.",
        "",
        f"*Question:* {_escape(study.question)}",
        "",
        f"*Claim:* {_escape(study.claim)} ({_escape(study.source)})",
        "",
        *([f"*Known before:* {_escape(study.known)}", ""] if study.known else []),
        f"**{_word(collection, judged)}**: {verdicts.claims_text(judged)}",
        "",
        *_predictions(judged),
        "",
        *_arms(collection),
        *_areas(collection),
        *(["", *left] if (left := [*_not_computed(collection, judged), *_unfinished(collection)]) else []),
    ]
    return [*parts, *(["", *study.notes.strip().splitlines()] if study.notes.strip() else [])]


def _word(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> str:
    word = verdicts.study_verdict(judged)
    if not collection.is_exploratory:
        return word
    early = sum(run.is_done and not run.is_confirmatory for run in collection.runs)
    return f"{word}, {EXPLORATORY} ({early} of {len(collection.runs)} runs started before it was registered)"


def _predictions(judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    head = "prediction|measured|effect|95 % interval|n|predicted effect|p|detectable|verdict".split("|")
    rows = []
    for prediction, verdict in judged:
        effect = as_told(prediction.scale, verdict.effect) if verdict.effect else None
        kind = f" ({ANYTIME})" if verdict.interval_kind == ANYTIME else ""
        least = format_number(prediction.min_effect) if prediction.min_effect else ""
        if prediction.scale is not Scale.plain and least:
            least = f"a factor {least}"
        if least:
            least = f", {'within' if prediction.direction is Direction.same else 'at least'} {least}"
        rows.append(
            (
                prediction.description + ("" if prediction.primary else " (secondary)"),
                verdicts.describe(prediction),
                prefix(prediction.scale) + format_number(effect.value) if effect else "",
                format_interval(effect.interval, format_number) + kind if effect else "",
                str(len(verdict.seeds)),
                prediction.direction.value + least,
                format_p(verdict.p_holm),
                detectable_text(prediction, verdict, format_number),
                verdict.word + (f" ({verdict.note})" if verdict.note else ""),
            )
        )
    return markdown_table(head, rows, _escape)


def _not_computed(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    """Return lines on why a prediction has no effect in seeds whose runs are all done."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for prediction, verdict in judged:
        arms = verdicts.arms_of(prediction, collection)
        for seed, why in verdict.missing.items():
            if all(run.is_done for run in collection.runs if run.seed == seed and run.arm in arms):
                found[prediction.description, why].append(seed)
    return [
        f"- {_escape(says)}: can't be computed for {_seeds(seeds)}: {_escape(why)}"
        for (says, why), seeds in found.items()
    ]


def _arms(collection: RunSet) -> list[str]:
    assert collection.study is not None
    metrics = collection.study.metrics
    by_metric = {metric: verdicts.versus_baseline(collection, metric) for metric in metrics}
    rows = []
    for arm in collection.arms:
        done = sum(run.arm == arm.name and run.is_done for run in collection.runs)
        rows.append((arm.name, str(done), *(_cell(by_metric[metric].get(arm.name)) for metric in metrics)))
    return [ARMS.format(baseline=collection.baseline), "", *markdown_table(("arm", "n", *metrics), rows, _escape)]


def _cell(measured: verdicts.Comparison | None) -> str:
    if measured is None:
        return ""
    value, difference, p, scale = measured
    lines = [format_estimate(value, format_number)]
    if difference is not None:
        star = "*" if p is not None and p < paired_tests.ALPHA else ""
        mark = prefix(scale) or ("+" if difference.value > 0 else "")
        lines.append(mark + format_estimate(difference, format_number) + star)
    return "\n".join(lines)


def _areas(collection: RunSet) -> list[str]:
    """Return the table of each group's share of the optimum's area; empty if no candidates were sampled."""
    lines = {seed: points for seed in collection.seeds if (points := frontier.optimum(collection, seed))}
    groups = sorted({arm.group for arm in collection.arms if arm.group})
    if not lines or not groups:
        return []
    rows = []
    for group in groups:
        shares = []
        for seed, line in lines.items():
            try:
                shares.append(frontier.area(frontier.of_arms(collection, group, seed), line))
            except NotMeasured:
                continue
        if shares:
            rows.append((group, str(len(shares)), format_estimate(paired_tests.paired(shares), format_number)))
    return [
        "",
        AREA.format(kl_max=frontier.KL_MAX, line=_line(lines)),
        "",
        *markdown_table(("group", "n", "share"), rows, _escape),
    ]


def _line(lines: Mapping[int, Sequence[frontier.Point]]) -> str:
    """Return a sentence on the gain of the optimum at some KLs, and where too few samples support it."""
    parts = []
    for kl in (0.5, 1.0, frontier.KL_MAX):
        gain = paired_tests.paired([_at(points, kl, "gain") for points in lines.values()]).value
        ess = paired_tests.paired([_at(points, kl, "ess") for points in lines.values()]).value
        mark = "" if ess >= frontier.TRUSTED else ", too few to be reliable"
        parts.append(
            f"{format_number(gain)} sd at {kl:g} nats ({format_number(ess)} effective samples per prompt{mark})"
        )
    return f"It gains {', '.join(parts)}."


def _at(points: Sequence[frontier.Point], kl: float, name: str) -> float:
    import numpy as np

    return float(np.interp(kl, [point.kl for point in points], [getattr(point, name) for point in points]))


def _unfinished(collection: RunSet) -> list[str]:
    """Return lines on runs that are not done, one for the runs of an arm that ended in the same way."""
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for run in collection.runs:
        if not run.is_done:
            found[run.arm, run.status, run.error or ""].append(run.seed)
    return [
        f"- {_escape(arm)}, {_seeds(seeds)}: {status}{f': {_escape(error)}' if error else ''}"
        for (arm, status, error), seeds in found.items()
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _commit(git: Mapping[str, object]) -> str:
    return f"{str(git['commit'])[:10]}{' with changes' if git.get('dirty') else ''}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def _escape(text: str) -> str:
    """Return text with Markdown escaped; a line break becomes `<br>`."""
    for mark in ("&", "<", "|", "*", "`", "["):
        text = text.replace(mark, {"&": "&amp;", "<": "&lt;"}.get(mark, f"\\{mark}"))
    return "<br>".join(" ".join(line.split()) for line in text.strip().splitlines())
