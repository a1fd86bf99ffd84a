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
    console: Console, jobs: Sequence[plan.Job], parts: Sequence[tuple[StudyRun, Sequence[plan.Job]]]
) -> None:
    """Print the plan. jobs: the jobs of all studies, each once; parts: each study with its own jobs."""
    statuses = {id(job): job.run_status() for job in jobs}
    for run, own in parts:
        study = run.study
        counts = Counter(statuses[id(job)].value for job in own)
        _print(console, f"{study.title} ({run.folder})")
        words = ", ".join(f"{count} {word}" for word, count in counts.items())
        _print(console, f"{len(study.arms)} arms x {len(study.seeds)} seeds: {len(own)} jobs, {words}")
        shared = set.intersection(*(set(arm.overrides) for arm in study.arms))
        if shared:
            _print(console, f"all: {' '.join(o for o in study.arms[0].overrides if o in shared)}")
        table = Table("arm", "overrides", "done", box=None, header_style="dim", pad_edge=False)
        for number, arm in enumerate(study.arms):
            of_arm = own[number :: len(study.arms)]
            done = sum(statuses[id(job)] is RunStatus.done for job in of_arm)
            table.add_row(arm.name, " ".join(o for o in arm.overrides if o not in shared), f"{done}/{len(of_arm)}")
        console.print(table)
        for line in _power(run):
            _print(console, line)
    left = [job for job in jobs if statuses[id(job)] is not RunStatus.done]
    _print(console, f"{len(left)} of {len(jobs)} jobs are left to run: {_cost(jobs, parts, len(left))}.")


def _power(run: StudyRun) -> Iterator[str]:
    """Yield lines on the effects that the study can detect, from its number of seeds and its earlier runs."""
    n = len(run.study.seeds)
    if n < 2:
        yield "One seed gives no interval: every verdict will be inconclusive."
        return
    yield (
        f"At power 0.8, {n} seeds detect an effect of {min_detectable_effect(1, n):.2g} times the spread of the paired"
        " differences (one prediction alone, at 5 %)."
    )
    for prediction, verdict in _earlier_verdicts(run):
        if verdict.effect is not None and verdict.effect.se and verdict.effect.n:
            spread = verdict.effect.se * math.sqrt(verdict.effect.n)
            detectable = min_detectable_effect(spread, n)
            yield f"  {prediction.description}: {detectable:.2g}; an effect of {prediction.min_effect:g} would matter"


def _cost(jobs: Sequence[plan.Job], parts: Sequence[tuple[StudyRun, Sequence[plan.Job]]], left: int) -> str:
    """Return the expected CPU time of `left` jobs, from finished ones or from the archived record."""
    spent = [seconds for job in jobs if (seconds := _cpu_seconds(job)) is not None]
    source = f"as in the {len(spent)} that are done"
    if not spent:
        spent, source = (
            [cost for run, _ in parts if (cost := _earlier_cost(run)) is not None],
            "as in the archived record",
        )
    if not spent:
        return "the time is unknown until the first job is done"
    each = mean(spent)
    return f"about {duration(left * each)} of CPU time, at {duration(each)} per job {source}"


def _earlier_verdicts(run: StudyRun) -> list[tuple[Prediction, Verdict]]:
    earlier = run.earlier()
    return decide(earlier) if earlier is not None and any(each.is_done for each in earlier.runs) else []


def _earlier_cost(run: StudyRun) -> float | None:
    earlier = run.earlier()
    return earlier.cpu_seconds_a_run() if earlier is not None else None


def _cpu_seconds(job: plan.Job) -> float | None:
    """Return the CPU time of a finished job; None if it is not done."""
    record = read_record(job.folder)
    if record is None or record.get("status") != "done" or not record.get("seconds"):
        return None
    return sum(stage["cpu"] for stage in record["seconds"].values())


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)
