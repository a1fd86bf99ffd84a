"""The command `python -m dpo_lab.study FILE... [budget=quick] [seeds=0,1,2] [key=value ...] [--plan]`: run a study and
report its verdict.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from dpo_lab import report
from dpo_lab.cli import entry_point
from dpo_lab.runs import run_record
from dpo_lab.runs.fingerprint import EXECUTION_KEYS, NOT_IN_FOLDER_NAMES, RECORD_KEYS, is_under, override_key
from dpo_lab.runs.redact import redact_command
from dpo_lab.studies.spec import StudyError
from dpo_lab.sweeps import study_rounds, study_sweeper
from dpo_lab.sweeps.study_file import COLLECTION, read
from dpo_lab.sweeps.study_run import StudyRun
from dpo_lab.terminal.pipes import quiet_if_closed
from dpo_lab.train import train

NOT_OF_ARMS = (*RECORD_KEYS, *EXECUTION_KEYS, "plugins")  # overrides of how a study is run, not of what its arms are

HELP = """Test a claim: run every arm under every seed, then report the verdicts with intervals.

  python -m dpo_lab.study ablations/beta.yaml                   the whole study; the same command resumes it
  python -m dpo_lab.study ablations/uniform_ref.yaml budget=quick    a small one, in minutes
  python -m dpo_lab.study ablations/beta.yaml --plan            its jobs, their cost, detectable effects; runs nothing
  python -m dpo_lab.study ablations/beta.yaml until=decided         as many seeds as it takes
  python -m dpo_lab.study ablations/beta.yaml launcher=joblib hydra.launcher.n_jobs=4     several jobs at once
  python -m dpo_lab.study ablations/beta.yaml policy=pretrained policy.path=... data.path=...   on your model and data
  python -m dpo_lab.study study=all budget=quick                every study of ablations/, a job on each core with joblib

budget=NAME: one of the file's budgets (default: full). seeds=0,1,2: instead of the budget's seeds. until=decided: add
seeds, those of the budget or of seeds= first, then the whole numbers after them, with a look after each, until every
primary prediction is decided or there are max_seeds (default: 24). name=NAME: the folder in outputs/ (default: studies).
Every other key=value applies to all runs, as with python -m dpo_lab.train.
"""


@quiet_if_closed()
def main(arguments: Sequence[str] | None = None, task: Callable[[], None] = train) -> int:
    """Run the command and return its exit code. task: the function decorated with `hydra.main` that runs one job."""
    parser = argparse.ArgumentParser("python -m dpo_lab.study", description=HELP, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", metavar="FILE or key=value", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    given = parser.parse_intermixed_args(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        runs, beside, arguments = planned_studies(given.words, typed)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    study_sweeper.register(runs, beside, given.plan)
    left_out = [key for key in NOT_IN_FOLDER_NAMES if key != "trainer.max_steps"]  # by which arms may differ
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(left_out)}]"
    sys.argv = [sys.argv[0], "--multirun", "hydra/sweeper=study", naming, *arguments]
    try:
        return entry_point.run_command(task)
    except SystemExit as end:  # the sweep ends by it
        code = end.code if isinstance(end.code, int) else 1
    if not given.plan and code in (0, 1):
        for run in runs:
            report.main([str(run.folder)])
        if len(runs) > 1:
            folders = [str(run.folder) for run in runs]
            report.main([*folders, "--front", str(runs[0].folder.parent.parent / "index.html")])
    return code


def planned_studies(words: Sequence[str], typed: Sequence[str]) -> tuple[list[StudyRun], list[StudyRun], list[str]]:
    """Return the studies, the other studies in their folders, and the overrides of all runs."""
    options = {"study": "", "budget": "full", "seeds": "", "until": "", "max_seeds": "", "name": "studies"}
    files, more = [], []
    for word in words:
        key, is_setting, value = word.partition("=")
        if is_setting and key in options:
            options[key] = value
        else:
            (more if is_setting else files).append(word)
    if options["study"] not in ("", "all"):
        raise StudyError(f"study={options['study']}: type study=all, or the path of a study file")
    beside = sorted(COLLECTION.glob("*.yaml"))
    paths = [*map(Path, files), *(beside if options["study"] else [])]
    if not paths:
        raise StudyError(f"which study? type python -m dpo_lab.study {' or '.join(map(str, beside)) or 'FILE.yaml'}")
    try:
        seeds = [int(seed) for seed in options["seeds"].split(",")] if options["seeds"] else None
    except ValueError:
        raise StudyError(f"seeds={options['seeds']}: must be whole numbers; type e.g. seeds=0,1,2") from None
    max_seeds = _max_seeds(options["until"], options["max_seeds"])
    arms = [word for word in more if not is_under(override_key(word), NOT_OF_ARMS) and not word.startswith("hydra")]
    root = run_record.OUTPUTS / run_record.name_of_folder(options["name"])
    command = redact_command(["python", "-m", "dpo_lab.study", *typed])

    def run(path: Path) -> StudyRun:
        study = read(path, options["budget"], seeds, arms)
        return StudyRun(study, path, options["budget"], arms, root, command, max_seeds)

    studies, beside = [run(path) for path in paths], []
    for other in sorted({other for path in paths for other in path.parent.glob("*.yaml")} - set(paths)):
        with suppress(StudyError):  # not a study, or without this budget
            beside.append(run(other))
    shared = [word for word in more if word not in arms]
    if options["study"]:
        shared += _at_once(shared)
    return studies, beside, [f"name={options['name']}/runs/{options['budget']}", *shared]


def _at_once(typed: Sequence[str]) -> list[str]:
    """Return the overrides by which a job runs on each core; none if a launcher or a trainer is typed, or joblib's launcher
    is not installed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_chosen = any(word.startswith(("launcher", "hydra", "trainer", "+launcher")) for word in typed)
    is_there = find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_joblib_launcher")
    return ["launcher=joblib", f"hydra.launcher.n_jobs={cores}"] if is_there and cores > 1 and not is_chosen else []


def _max_seeds(until: str, max_seeds: str) -> int | None:
    """Return the most seeds of a study that adds seeds until it is decided; None if it has those of its budget."""
    if until not in ("", study_rounds.DECIDED):
        raise StudyError(f"until={until}: type until=decided, or leave it out for the seeds of the budget")
    if not until:
        if max_seeds:
            raise StudyError(f"max_seeds={max_seeds}: goes with until=decided")
        return None
    if max_seeds and (not max_seeds.isdecimal() or int(max_seeds) < study_rounds.FEWEST):
        fewest = study_rounds.FEWEST
        raise StudyError(f"max_seeds={max_seeds}: must be a whole number, {fewest} or more, since fewer decide nothing")
    return int(max_seeds or study_rounds.MAX_SEEDS)


if __name__ == "__main__":
    sys.exit(main())
