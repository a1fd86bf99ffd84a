"""The plan of a study before it runs: its jobs, their cost, and how many seeds decide its predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

import numpy as np
from rich.console import Console
from rich.table import Table

from dpo_lab.reporting.comparison import effect_text
from dpo_lab.reporting.formatting import format_value
from dpo_lab.runs.run_record import RunStatus, read_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import min_detectable_effect
from dpo_lab.stats.text import percent
from dpo_lab.studies.effects import effect_per_seed
from dpo_lab.studies.seed_effects import arms_of
from dpo_lab.studies.spec import Direction, Prediction
from dpo_lab.sweeps import plan, study_power, study_rounds
from dpo_lab.sweeps.study_power import MOST, Power, expected
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
        for arm in study.arms:
            of_arm = [statuses[id(job)] for (name, _), job in zip(run.places, own, strict=True) if name == arm.name]
            done = f"{of_arm.count(RunStatus.done)}/{len(of_arm)}"
            table.add_row(arm.name, " ".join(o for o in arm.overrides if o not in shared), done)
        console.print(table)
        _show_power(console, run)
    left = [job for job in jobs if statuses[id(job)] is not RunStatus.done]
    _print(console, f"{len(left)} of {len(jobs)} jobs are left to run: {_cost(jobs, parts, len(left))}.")


def _show_power(console: Console, run: StudyRun) -> None:
    """Print how many seeds decide each prediction, and all primary ones, from the effects of earlier runs."""
    n, most = len(run.study.seeds), len(run.order) if run.adds_seeds else study_rounds.MAX_SEEDS
    if not run.adds_seeds and n < 2:
        _print(console, "One seed gives no interval: every verdict will be inconclusive.")
    elif not run.adds_seeds:
        ratio = min_detectable_effect(1, n)
        text = f"At power 0.8, {n} seeds detect an effect of {ratio:.2g} times the spread of the paired differences"
        _print(console, f"{text} (one prediction alone, at 5 %).")
    powers = _powers(run)
    if not any(powers):
        _print(
            console, "No earlier runs of two seeds: how many seeds decide a prediction is unknown until there are some."
        )
        return
    head = ("prediction", "effect", "sd on its scale", "seeds at power 0.8", "until=decided", f"decided by {most}")
    table = Table(*head, box=None, header_style="dim", pad_edge=False)
    for prediction, power in zip(run.study.predictions, powers, strict=True):
        cells = ["unknown", "", "", "", ""]
        if power is not None:
            seeds, share = expected(power.ends, most)
            fixed = str(power.fixed or f"over {MOST}")
            cells = [
                _told(prediction, power),
                format_value(power.sd),
                fixed,
                f"{seeds:.0f} on average",
                percent(share),
            ]
        table.add_row(prediction.description + ("" if prediction.primary else " (secondary)"), *cells)
    console.print(table)
    primary = [(p, power) for p, power in zip(run.study.predictions, powers, strict=True) if p.primary]
    known = [(prediction, power) for prediction, power in primary if power is not None]
    if known:
        _print(console, _whole(run, known, len(primary) - len(known), most))


def _told(prediction: Prediction, power: Power) -> str:
    """Return the effect of earlier runs as text, on a scale of logarithms as a factor."""
    return effect_text(Estimate(power.effect), prediction.scale)


def _whole(run: StudyRun, known: Sequence[tuple[Prediction, Power]], unknown: int, most: int) -> str:
    """Return a line on the seeds and the CPU time that all primary predictions take, as if they were independent."""
    study, each = run.study, _earlier_cost(run)
    over = np.max([power.ends for _, power in known], 0)
    seeds_on_average, share = expected(over, most)
    begun = np.minimum(over, run.all_arms)
    jobs = 0.0  # on average over the simulated studies
    for arm in study.arms:
        of_arm = [power.ends for prediction, power in known if arm.name in arms_of(prediction, study)]
        jobs += expected(np.max([begun, *([over] if arm.name == study.baseline else of_arm)], 0), most)[0]
    cost = lambda jobs: f" ({duration(jobs * each)} of CPU time)" if each else ""  # noqa: E731
    left_out = f", {unknown} without earlier effects left out" if unknown else ""
    fixed = f"over {MOST} seeds"
    if all(power.fixed for _, power in known):
        seeds = max(power.fixed or 0 for _, power in known)
        fixed = f"{seeds} seeds{cost(seeds * len(study.arms))}"
    return (
        f"All primary predictions{left_out}: {fixed} of a fixed number; until=decided: {seeds_on_average:.0f} seeds and"
        f" {jobs:.0f} runs on average{cost(jobs)}, at most {most} seeds{cost(most * len(study.arms))}, all decided in"
        f" {percent(share)}."
    )


def _powers(run: StudyRun) -> list[Power | None]:
    """Return the power of each prediction, None without effects of earlier runs."""
    earlier, predictions = run.earlier(), run.study.predictions
    if earlier is None:
        return [None] * len(predictions)
    found = []
    for number, prediction in enumerate(predictions):
        family = [p for p in predictions if p.primary or not prediction.primary]
        tests = sum(p.direction is not Direction.same for p in family)
        effects, _ = effect_per_seed(prediction, earlier)
        found.append(study_power.power(prediction, [*effects.values()], max(1, tests), number))
    return found


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
