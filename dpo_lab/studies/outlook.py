"""What a study would run, what it may cost and what it could show, before anything of it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dpo_lab.results.runs import Standing, read_record
from dpo_lab.studies.record import StudyRun
from dpo_lab.sweep import plan
from dpo_lab.sweep.summary import duration


def show_outlook(
    console: Console, cells: Sequence[plan.Cell], parts: Sequence[tuple[StudyRun, Sequence[plan.Cell]]]
) -> None:
    """Print it. cells: all that the studies need, each once; parts: those of each study."""
    were = {id(cell): cell.standing() for cell in cells}
    spent = {id(cell): seconds for cell in cells if (seconds := _cpu_seconds(cell)) is not None}
    for study, own in parts:
        counts = Counter(were[id(cell)].value for cell in own)
        console.print(f"{study.study.title} ({study.folder})", style="bold", highlight=False, markup=False)
        console.print(
            f"{len(study.study.arms)} arms x {len(study.study.seeds)} seeds: {len(own)} cells,"
            f" {', '.join(f'{count} {word}' for word, count in counts.items())}",
            highlight=False,
        )
        table = Table("arm", "overrides", "runs done", box=None, header_style="dim", pad_edge=False)
        for number, arm in enumerate(study.study.arms):
            of_arm = own[number :: len(study.study.arms)]
            done = sum(were[id(cell)] is Standing.done for cell in of_arm)
            table.add_row(arm.name, " ".join(arm.overrides), f"{done}/{len(of_arm)}")
        console.print(table, markup=False)
    left = sum(where is not Standing.done for where in were.values())
    if spent:
        each = sum(spent.values()) / len(spent)
        total = f"about {duration(left * each)} of CPU time, at {duration(each)} a cell as in the {len(spent)} that are done"
    else:
        total = "its cost is not known before a first cell is done"
    console.print(f"{left} of {len(cells)} cells are to be run: {total}.", highlight=False)


def _cpu_seconds(cell: plan.Cell) -> float | None:
    record = read_record(cell.folder)
    if record is None or record.get("status") != "done":
        return None
    return sum(stage["cpu"] for stage in record["seconds"].values())
