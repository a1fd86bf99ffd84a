"""Write the results of one archived study as Markdown: its predictions, verdicts, arms and cost, from its record alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dpo_lab.reporting.comparison import detectable_text
from dpo_lab.reporting.front_page import title_of
from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.stats import paired_tests
from dpo_lab.stats.text import format_estimate, format_interval, format_p
from dpo_lab.studies import frontier, verdicts
from dpo_lab.studies.run_data import NotMeasured, RunSet
from dpo_lab.studies.scales import Scale, as_told, prefix
from dpo_lab.studies.spec import Direction, Prediction
from dpo_lab.studies.verdicts import ANYTIME

EXPLORATORY = "exploratory"
ARMS = (
    "Means over seeds with 95 % intervals, of KL, perplexity and other ratio quantities geometric means; below each the"
    " difference to {baseline}, or the factor (x), paired by seed, with `*` if its p, Holm-corrected over arms, is below"
    " .05; of studies that add seeds until they are decided, these are anytime-valid."
)
AREA = (
    "Area under the frontier of gain against KL, from 0 to {kl_max:g} nats, as a share of the optimum's area. The optimum is"
    " estimated by exponentially tilting samples of the initial policy. {line}"
)


def study_page(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> str:
    """Return the text of a study's page; the same record gives the same bytes."""
    return "\n".join(_section(collection, judged)) + "\n"


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


def _section(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    study, record = collection.study, collection.record
    assert study is not None
    commits = sorted({_commit(run.record["git"]) for run in collection.runs if run.record.get("git")})
    facts = [
        f"{date(collection)}, budget {record.get('budget') or 'full'}, {len(collection.seeds)} seeds",
        f"{hours(collection.cpu_seconds())} of CPU time",
        *([f"commit {', '.join(commits)}"] if commits else []),
    ]
    parts = [
        f"# {escape(title_of(collection))}",
        "",
        *([f"    {record['command']}", ""] if record.get("command") else []),
        f"{'; '.join(facts)}.",
        "",
        f"*Question:* {escape(study.question)}",
        "",
        f"*Claim:* {escape(study.claim)} ({escape(study.source)})",
        "",
        *([f"*Known before:* {escape(study.known)}", ""] if study.known else []),
        f"**{word_of(collection, judged)}**: {verdicts.claims_text(judged)}",
        "",
        *_predictions(judged),
        "",
        *_arms(collection),
        *_areas(collection),
        *(["", *left] if (left := [*_not_computed(collection, judged), *_unfinished(collection)]) else []),
    ]
    return [*parts, *(["", *study.notes.strip().splitlines()] if study.notes.strip() else [])]


def word_of(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> str:
    """Return a study's verdict, and whether it is exploratory."""
    word = verdicts.study_verdict(judged)
    if not collection.is_exploratory:
        return word
    early = sum(run.is_done and not run.is_confirmatory for run in collection.runs)
    return f"{word}, {EXPLORATORY} ({early} of {len(collection.runs)} runs started before it was registered)"


def predicted(prediction: Prediction) -> str:
    """Return the predicted effect as text, `less, at least 0.2`."""
    how = "within" if prediction.direction is Direction.same else "at least"
    of = "" if prediction.scale is Scale.plain else "a factor "
    least = f", {how} {of}{format_number(prediction.min_effect)}" if prediction.min_effect else ""
    return prediction.direction.value + least


def _predictions(judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    head = "prediction|measured|effect|95 % interval|n|predicted effect|p|detectable|verdict".split("|")
    rows = []
    for prediction, verdict in judged:
        effect = as_told(prediction.scale, verdict.effect) if verdict.effect else None
        kind = f" ({ANYTIME})" if verdict.interval_kind == ANYTIME else ""
        rows.append(
            (
                prediction.description + ("" if prediction.primary else " (secondary)"),
                verdicts.describe(prediction),
                prefix(prediction.scale) + format_number(effect.value) if effect else "",
                format_interval(effect.interval, format_number) + kind if effect else "",
                str(len(verdict.seeds)),
                predicted(prediction),
                format_p(verdict.p_holm),
                detectable_text(prediction, verdict, format_number),
                verdict.word + (f" ({verdict.note})" if verdict.note else ""),
            )
        )
    return markdown_table(head, rows, escape)


def _not_computed(collection: RunSet, judged: Sequence[tuple[Prediction, paired_tests.Verdict]]) -> list[str]:
    """Return lines on why a prediction has no effect in seeds whose runs are all done."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for prediction, verdict in judged:
        arms = verdicts.arms_of(prediction, collection)
        for seed, why in verdict.missing.items():
            if all(run.is_done for run in collection.runs if run.seed == seed and run.arm in arms):
                found[prediction.description, why].append(seed)
    return [
        f"- {escape(says)}: can't be computed for {_seeds(seeds)}: {escape(why)}"
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
    return [ARMS.format(baseline=collection.baseline), "", *markdown_table(("arm", "n", *metrics), rows, escape)]


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
        *markdown_table(("group", "n", "share"), rows, escape),
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
        f"- {escape(arm)}, {_seeds(seeds)}: {status}{f': {escape(error)}' if error else ''}"
        for (arm, status, error), seeds in found.items()
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _commit(git: Mapping[str, object]) -> str:
    return f"{str(git['commit'])[:10]}{' with changes' if git.get('dirty') else ''}"


def hours(seconds: float) -> str:
    """Return a time as text, `1.41 h`."""
    return f"{seconds / 3600:.2f} h"


def escape(text: str) -> str:
    """Return text with Markdown escaped; a line break becomes `<br>`."""
    for mark in ("&", "<", "|", "*", "`", "["):
        text = text.replace(mark, {"&": "&amp;", "<": "&lt;"}.get(mark, f"\\{mark}"))
    return "<br>".join(" ".join(line.split()) for line in text.strip().splitlines())
