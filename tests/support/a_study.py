"""Studies of numbers that a test chooses: runs that nobody made, with just what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.run_data import RunData, RunSet, assemble
from dpo_lab.studies.spec import Arm, Direction, Measure, Missing, Prediction, Study

REGISTERED = "2026-11-20T08:00:00+00:00"
BEGUN = "2026-11-20T09:00:00+00:00"


def predicts(of: str, metric: str = "gold_gain", **settings: Any) -> Prediction:
    """A difference to the arm `base` that is above 0, unless told otherwise."""
    made = {
        "description": f"of {of}",
        "measure": Measure.difference,
        "direction": Direction.more,
        "metric": metric,
    } | settings
    if made["measure"] is Measure.difference:
        made.setdefault("control", "base")
    return Prediction(treatment=of, **made)


def study(
    arms: Sequence[str | Arm],
    predictions: Sequence[Prediction] = (),
    seeds: int = 5,
    missing: Missing = Missing.bounds,
) -> Study:
    """The first arm is the baseline."""
    every = [arm if isinstance(arm, Arm) else Arm(arm, [f"arm={arm}"]) for arm in arms]
    return Study(
        name="example",
        title="An example",
        question="Does it?",
        claim="It does.",
        source="A paper, 2024",
        predictions=list(predictions),
        arms=every,
        baseline=every[0].name,
        seeds=list(range(seeds)),
        metrics=["gold_gain", "kl"],
        missing=missing,
    )


def run(arm: str, seed: int, metrics: Mapping[str, float], **record: Any) -> RunData:
    """One that is done."""
    entries = {
        "status": "done",
        "started": BEGUN,
        "health": [],
        "seconds": {"dpo": {"wall": 9.0, "cpu": 20.0}},
    } | record
    estimates = {name: Estimate(value, 0.01, 512) for name, value in metrics.items()}
    return RunData(Path("runs/full") / arm / f"seed={seed}", arm, seed, "done", None, entries, estimates)


def measured(
    of: Study,
    values: Callable[[Arm, int], Mapping[str, float] | RunData],
    registered: str = REGISTERED,
    **more: Any,
) -> RunSet:
    """Every arm x seed; values(arm, seed) gives the metrics of a run that is done, or any run; more: of study.json."""
    runs = []
    for arm in of.arms:
        for seed in of.seeds:
            found = values(arm, seed)
            runs.append(found if isinstance(found, RunData) else run(arm.name, seed, found))
    record = {
        "budget": "full",
        "command": "python -m dpo_lab.study ablations/example.yaml",
        "status": "done",
        "registrations": [{"digest": of.digest(), "at": registered}],
        **more,
    }
    return assemble(of, Path("example"), record, runs)
