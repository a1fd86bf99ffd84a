"""The Python interface of the commands: train, sweep and study from a script, a notebook or a test, and load runs.

    from dpo_lab import api

    run = api.train(["beta=0.3", "seed=1"])         what python -m dpo_lab.train beta=0.3 seed=1 does
    run.metrics["kl"].interval, run.history, run.examples, run.policy()
    runs = api.sweep({"beta": [0.03, 0.3], "seed": [0, 1, 2]})
    runs.table(), runs.compare("beta=0.03")
    runs = api.load_runs("outputs/dpo")

Errors that the commands print in one line are raised as LabError with that line.
"""

from dpo_lab.api.commands import Overrides, evaluate, reward, sft, study, sweep, train
from dpo_lab.api.run import Run, load_run
from dpo_lab.api.runs import Runs, load_runs
from dpo_lab.errors import LabError
from dpo_lab.stats.estimates import Estimate

__all__ = [
    "Estimate",
    "LabError",
    "Overrides",
    "Run",
    "Runs",
    "evaluate",
    "load_run",
    "load_runs",
    "reward",
    "sft",
    "study",
    "sweep",
    "train",
]
