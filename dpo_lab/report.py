"""The command `python -m dpo_lab.report FOLDER...`: compare runs, sweeps and studies from what lies in their folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from dpo_lab.studies import grouping
from dpo_lab.studies.run_data import RunSet, check_metrics
from dpo_lab.studies.spec import StudyError
from dpo_lab.terminal.pipes import quiet_if_closed

DESCRIPTION = """\
Compare runs, sweeps and studies from their folders alone: nothing is trained, no model is loaded.

A study is reported with its verdicts first. Other runs whose settings differ only in the seed are one arm.
A table is printed, and one self-contained HTML page is written beside the runs.
"""
EXAMPLES = """\
examples:
  python -m dpo_lab.report outputs/studies/beta/full              a study: verdict, tables, page
  python -m dpo_lab.report outputs/dpo --baseline beta=0.1        all runs of one name, compared with an arm
  python -m dpo_lab.report outputs/a outputs/b --metrics gold_gain,kl,"gold_gain / kl"
  python -m dpo_lab.report outputs/dpo --csv > arms.csv           every digit, for further processing
  python -m dpo_lab.report outputs/studies/beta/full --archive ablations/records
  python -m dpo_lab.report outputs/studies --front                the front page: all claims of all studies in one picture
  python -m dpo_lab.report --results                              the same of the archived records, and RESULTS.md
  python -m dpo_lab.report --results ablations/RESULTS.md --check
"""


@quiet_if_closed()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done; 1 `--check` found a difference; 2 error, see the message."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_lab.report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="the folder of a run, a sweep, a study, or several of them; or an archived record (.json)",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="the arm that the others are compared with (default: that of default settings)",
    )
    parser.add_argument(
        "--metrics", metavar="A,B", default="", help="metrics to compare: names in run.json, or `a - b`, `a / b` of two"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--markdown", action="store_true", help="print Markdown, write no page unless --page is given")
    shape.add_argument(
        "--csv", action="store_true", help="print CSV with every digit, write no page unless --page is given"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="path of the page (default: report.html in the first folder)"
    )
    parser.add_argument(
        "--front",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write the front page of the studies in the folders alone, a picture of all their claims (default: index.html"
        " in the first folder)",
    )
    kept = parser.add_argument_group("archived records")
    kept.add_argument(
        "--archive", type=Path, metavar="DIR", help="write a small record of each study to DIR, to be committed"
    )
    kept.add_argument(
        "--results",
        type=Path,
        nargs="?",
        const=Path("ablations/RESULTS.md"),
        metavar="FILE",
        help="write the results in the archived records of records/ beside FILE (default: ablations/RESULTS.md): a table, a"
        " page for each study, and a front page, pages/index.html",
    )
    kept.add_argument(
        "--check", action="store_true", help="with --results: write nothing, print where the file differs"
    )
    return parser


def _report(options: argparse.Namespace) -> int:
    if options.results is not None:
        return _results(options.results, options.check)
    if options.check:
        raise StudyError("--check: goes with --results FILE")
    if options.paths and options.front is not None:
        return _front(options.front if options.front != Path() else options.paths[0] / "index.html", options.paths)
    if not options.paths:
        raise StudyError(
            "type the folder of a run, a sweep or a study, e.g. python -m dpo_lab.report outputs/dpo; see --help"
        )
    from dpo_lab.studies.load import gather

    collections = gather(options.paths)
    if options.baseline:
        with _typed("--baseline"):
            collections = [collection.compared_with(options.baseline) for collection in collections]
    else:
        collections = [_with_default_baseline(collection) for collection in collections]
    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    with _typed("--metrics"):
        check_metrics(collections, metrics)
    page = None
    if options.page or not (options.markdown or options.csv or options.archive):
        page = _checked(options.page or collections[0].folder / "report.html")
    if page:  # before printing: the reader of a pipe may close it before the end
        _write(page, collections, metrics)
    if options.archive:
        from dpo_lab.studies import archive

        paths = [archive.write(collection, options.archive) for collection in collections]
        print(*(f"Archived: {path}" for path in paths), sep="\n", file=sys.stderr)
    _print(options, collections, metrics)
    if page:
        print(f"Page: {page}", file=sys.stderr if options.csv or options.markdown else sys.stdout)
    return 0


@contextmanager
def _typed(option: str) -> Iterator[None]:
    """Name an option of the command in the errors of its value."""
    try:
        yield
    except StudyError as error:
        raise StudyError(f"{option} {error}") from None


def _with_default_baseline(collection: RunSet) -> RunSet:
    """Return the runs with the arm of default settings as their baseline, if they have no baseline and there is one."""
    settings = {run.arm: grouping.settings(run.record["config"]) for run in collection.runs if "config" in run.record}
    if collection.baseline or len(settings) < 2:
        return collection
    from dpo_lab.config.default_settings import default_settings

    arm = grouping.default_arm(settings, default_settings(next(iter(settings.values()))))
    return replace(collection, baseline=arm, baseline_reason="the arm of default settings") if arm else collection


def _checked(page: Path, option: str = "--page") -> Path:
    """Return the path of a page. Raise StudyError if it holds another file than an earlier one."""
    from dpo_lab.reporting.comparison_page import MADE_BY
    from dpo_lab.reporting.html_page import may_be_written

    try:
        if may_be_written(page, MADE_BY):
            return page
    except OSError as error:
        raise StudyError(f"{page}: {error.strerror}; type another {option} FILE") from None
    raise StudyError(f"{page}: holds a file that is not a report; type another {option} FILE")


def _write(page: Path, collections: Sequence[RunSet], metrics: Sequence[str]) -> None:
    from dpo_lab.reporting.comparison_page import page as drawn

    _write_page(page, drawn(collections, page.parent, metrics))


def _write_page(page: Path, content: str) -> None:
    """Write a page, over an earlier one alone. Raise StudyError if that can't be done."""
    from dpo_lab.runs.atomic_write import write_atomic

    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, content)
    except OSError as error:
        raise StudyError(f"{page}: {error.strerror}; type another --page FILE") from None


def _print(options: argparse.Namespace, collections: Sequence[RunSet], metrics: Sequence[str]) -> None:
    from dpo_lab.reporting import comparison_text
    from dpo_lab.terminal.progress import plain_console

    if options.csv:
        print(comparison_text.as_csv(collections, metrics), end="")
    elif options.markdown:
        print("\n".join(comparison_text.markdown(collection, metrics) for collection in collections))
    else:
        console = plain_console()
        for collection in collections:
            comparison_text.show(console, collection, metrics)


def _results(file: Path, check: bool) -> int:
    """Write the results of the archived records beside the file to it, or print where it differs from them."""
    from dpo_lab.reporting.results_md import check_results, name_of, read_records, write_results
    from dpo_lab.studies.archive import FOLDER

    records = file.parent / FOLDER
    if not check:
        write_results(records, file)
        print(f"Written: {file}")
        pages = file.parent / "pages"
        studies = [(pages / f"{name_of(study)}.html", study) for study in read_records(records)]
        for page, study in studies:
            _write(_checked(page, "--results"), [study], [])
        _write_front(pages / "index.html", studies)
        return 0
    differences = check_results(records, file)
    for difference in differences:
        print(difference, file=sys.stderr)
    if not differences:
        print(f"{file}: agrees with the records")
    return 1 if differences else 0


def _front(file: Path, paths: Sequence[Path]) -> int:
    """Write the front page of the studies in folders, each linked to its page there."""
    from dpo_lab.studies.load import gather

    studies = [study for study in gather(paths) if study.study is not None]
    if not studies:
        raise StudyError(f"--front: no study in {', '.join(map(str, paths))}; type the folder of studies")
    _write_front(file, [(study.folder / "report.html", study) for study in studies])
    return 0


def _write_front(file: Path, studies: Sequence[tuple[Path, RunSet]]) -> None:
    """Write the front page of studies, each with the path of its page, which is linked if there is one."""
    from dpo_lab.reporting.front_page import front_page

    def link(page: Path) -> str:
        return quote(Path(os.path.relpath(page, file.parent)).as_posix()) if page.exists() else ""

    _write_page(_checked(file, "--front"), front_page([(study, link(page)) for page, study in studies]))
    print(f"Front page: {file}")


if __name__ == "__main__":
    sys.exit(main())
