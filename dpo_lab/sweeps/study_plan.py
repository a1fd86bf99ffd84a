"""The plan of a study before it runs: its jobs, their cost, and the effect that they could detect."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

from dpo_lab.runs.run_record import RunStatus, read_record
from dpo_lab.stats.paired_tests import Verdict, min_detectable_effect
from dpo_lab.studies.spec import Prediction
from dpo_lab.studies.verdicts import decide
from dpo_lab.sweeps import plan
from dpo_lab.sweeps.study_run import StudyRun
from dpo_lab.sweeps.summary import duration


def show_outlook(
    console: Console, cells: Sequence[plan.Job], parts: Sequence[tuple[StudyRun, Sequence[plan.Job]]]
) -> None:
    """Print it. cells: all that the studies need, each once; parts: those of each study."""
    were = {id(cell): cell.standing() for cell in cells}
    for run, own in parts:
        study = run.study
        counts = Counter(were[id(cell)].value for cell in own)
        _say(console, f"{study.title} ({run.folder})")
        words = ", ".join(f"{count} {word}" for word, count in counts.items())
        _say(console, f"{len(study.arms)} arms x {len(study.seeds)} seeds: {len(own)} cells, {words}")
        shared = set.intersection(*(set(arm.overrides) for arm in study.arms))
        if shared:
            _say(console, f"all: {' '.join(o for o in study.arms[0].overrides if o in shared)}")
        table = Table("arm", "overrides", "done", box=None, header_style="dim", pad_edge=False)
        for number, arm in enumerate(study.arms):
            of_arm = own[number :: len(study.arms)]
            done = sum(were[id(cell)] is RunStatus.done for cell in of_arm)
            table.add_row(arm.name, " ".join(o for o in arm.overrides if o not in shared), f"{done}/{len(of_arm)}")
        console.print(table)
        for line in _what_it_could_show(run):
            _say(console, line)
    left = [cell for cell in cells if were[id(cell)] is not RunStatus.done]
    _say(console, f"{len(left)} of {len(cells)} cells are to be run: {_cost(cells, parts, len(left))}.")


def _what_it_could_show(run: StudyRun) -> Iterator[str]:
    n = len(run.study.seeds)
    if n < 2:
        yield "One seed has no interval: every verdict will be inconclusive."
        return
    yield (
        f"At power 0.8, {n} seeds detect an effect of {min_detectable_effect(1, n):.2g} times the spread of the paired"
        " differences (one prediction alone, at 5 %)."
    )
    for prediction, verdict in _judged(run):
        if verdict.effect is not None and verdict.effect.se and verdict.effect.n:
            spread = verdict.effect.se * math.sqrt(verdict.effect.n)
            yield f"  {prediction.says}: {min_detectable_effect(spread, n):.2g}; {prediction.at_least:g} would matter"


def _cost(cells: Sequence[plan.Job], parts: Sequence[tuple[StudyRun, Sequence[plan.Job]]], left: int) -> str:
    spent = [seconds for cell in cells if (seconds := _cpu_seconds(cell)) is not None]
    what = f"as in the {len(spent)} that are done"
    if not spent:
        spent, what = [cost for run, _ in parts if (cost := _earlier_cost(run)) is not None], "as in the kept record"
    if not spent:
        return "what that takes is not known before a first cell is done"
    each = mean(spent)
    return f"about {duration(left * each)} of CPU time, at {duration(each)} a cell {what}"


def _judged(run: StudyRun) -> list[tuple[Prediction, Verdict]]:
    earlier = run.earlier()
    return decide(earlier) if earlier is not None and any(each.is_done for each in earlier.runs) else []


def _earlier_cost(run: StudyRun) -> float | None:
    earlier = run.earlier()
    return earlier.cpu_seconds_a_run() if earlier is not None else None


def _cpu_seconds(cell: plan.Job) -> float | None:
    record = read_record(cell.folder)
    if record is None or record.get("status") != "done" or not record.get("seconds"):
        return None
    return sum(stage["cpu"] for stage in record["seconds"].values())


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)
