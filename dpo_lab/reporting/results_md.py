"""Write `ablations/RESULTS.md`, a table of every archived study's claims and verdicts, and a page for each, from records
alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from dpo_lab.reporting import forest
from dpo_lab.reporting.front_page import title_of
from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.reporting.results_study_md import date, escape, format_number, hours, predicted, study_page, word_of
from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.stats.paired_tests import Verdict
from dpo_lab.stats.text import format_estimate
from dpo_lab.studies import archive, verdicts
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import as_told, prefix
from dpo_lab.studies.spec import Prediction, StudyError

PAGES = "results"  # the folder of the studies' pages, beside the table
Judged = Sequence[tuple[Prediction, Verdict]]
HEAD = """# Results

Every number here and on the studies' pages is computed from the archived records of runs, `ablations/records/*.json`, by
`python -m dpo_lab.report --results`; with `--check` the same command shows where a file differs from the records. It also
writes `ablations/pages/index.html`, the same table as a picture. Negative results are included.

n is the number of seeds. An effect is computed for each seed, between runs that share data, order and prompts; its 95 %
interval is Student's t over seeds (Clopper-Pearson for yes/no metrics), or anytime-valid where seeds were added until
the study was decided. Effects on KL, perplexity and other ratio quantities are factors (x), unless they were registered
as differences ([docs/statistics.md](../docs/statistics.md)). p is two-sided and Holm-corrected over the
study's primary predictions (for a secondary prediction, over all). *Supported*: the effect has the predicted sign, p is
below .05, and the effect is at least the smallest relevant one. *Not supported*: the interval excludes every relevant
effect. *Inconclusive*: neither; `detectable` is the effect that this number of seeds detects at power 0.8.
*Exploratory*: some runs started before the prediction was registered.
"""


def write_results(records: Path, path: Path) -> None:
    """Write the table of all records in a folder, and the page of each. Raises StudyError if one can't be read, or there is
    none.
    """
    for place, text in _files(records, path).items():
        place.parent.mkdir(exist_ok=True)
        write_atomic(place, text)


def check_results(records: Path, path: Path) -> list[str]:
    """Return the lines in which the table or a page differs from the records: `-` in the file, `+` from the records.

    Raises StudyError if a file does not exist, or a record can't be read.
    """
    found, files = [], _files(records, path)
    for place, text in files.items():
        if not place.is_file():
            raise StudyError(f"{place}: no such file; type the same command without --check to write it")
        found += _differences(place, place.read_text(encoding="utf-8").splitlines(), text.splitlines())
    more = sorted(set((path.parent / PAGES).glob("*.md")) - set(files))
    return [*found, *(f"{place}: - no record has this page" for place in more)]


def _differences(place: Path, written: Sequence[str], expected: Sequence[str]) -> list[str]:
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, written, expected, autojunk=False).get_opcodes():
        if tag != "equal":
            found += [f"{place}:{number + 1}: - {written[number]}" for number in range(a, b)]
            found += [f"{place}:{a + 1}: + {expected[number]}" for number in range(c, d)]
    return found


def _files(records: Path, path: Path) -> dict[Path, str]:
    """Return the text of the table and of every page, by path."""
    judged = [(study, verdicts.decide(study)) for study in read_records(records)]
    pages = {path.parent / PAGES / f"{name_of(study)}.md": study_page(study, found) for study, found in judged}
    return {path: results(judged, records.name), **pages}


def results(judged: Sequence[tuple[RunSet, Judged]], records: str) -> str:
    """Return the text of the table; the same records give the same bytes. records: the name of their folder."""
    rows, seconds = [], {}
    for study, found in judged:
        seconds |= study.costs()
        rows += _rows(study, found, records)
    total = (
        f"All studies took {hours(math.fsum(seconds.values()))} of CPU time; a run shared by several is counted once."
    )
    table = markdown_table(("study and its claims", "effect, 95 % interval", "predicted", "n", "verdict"), rows, str)
    return "\n".join([HEAD, total, "", *table]) + "\n"


def _rows(study: RunSet, judged: Judged, records: str) -> list[tuple[str, ...]]:
    """Return a row for a study, linked to its page and record, and one for each of its primary predictions."""
    name = name_of(study)
    facts = f"{date(study)}, {len(study.seeds)} seeds, {hours(study.cpu_seconds())}"
    title = f"**[{escape(title_of(study))}]({PAGES}/{name}.md)** ({facts}; [record]({records}/{name}.json))"
    rows = [(title, "", "", "", f"**{word_of(study, judged)}**<br>{verdicts.claims_text(judged)}")]
    for claim, (prediction, verdict) in zip(
        forest.claims(judged, only_primary=True), [each for each in judged if each[0].primary], strict=True
    ):
        effect = ""
        if verdict.effect:
            told = format_estimate(as_told(prediction.scale, verdict.effect), format_number)
            effect = prefix(prediction.scale) + told
        word = f"{claim.mark} {claim.word}"
        rows.append((escape(claim.description), effect, predicted(prediction), str(claim.seeds), word))
    return rows


def name_of(study: RunSet) -> str:
    """Return the name of a study's page: that of its record."""
    assert study.study is not None
    return study.record.get("kept_as") or archive.path_of(Path(), study.study.name, study.record.get("budget")).stem


def read_records(records: Path) -> list[RunSet]:
    """Return the studies of all records in a folder, by name. Raises StudyError if one can't be read, or there is none."""
    found = [archive.read(path) for path in sorted(records.glob("*.json"), key=lambda path: path.stem)]
    if not found:
        raise StudyError(f"{records}: holds no archived record; archive a study first, with --archive {records}")
    return found
