"""The command `python -m dpo_lab.evaluate run=FOLDER [evals.key=value ...]`, or trained=FOLDER of any policy: measure a policy
that is already trained.
"""

from __future__ import annotations

import json
import sys

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.config import from_run, schema
from dpo_lab.distributed.fork_server import fast_imports

schema.register()
from_run.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="evaluate")
def evaluate(cfg: DictConfig) -> None:
    entry_point.validate_and_run(cfg, lambda settings: _evaluate(cfg, settings))


def _evaluate(cfg: DictConfig, settings: schema.RunConfig) -> None:
    assert isinstance(settings, from_run.EvaluateConfig)
    print(f"dpo_lab: {settings.folder}", flush=True)  # before torch is imported, which takes seconds
    with fast_imports():
        from dpo_lab.pipelines.evaluate_run import run_evaluation

    run_evaluation(cfg, settings)


def as_path(argument: str) -> str:
    """Quote the value of run=, trained= and evals.third= for Hydra, since run folders contain commas and equals signs."""
    key, _, value = argument.partition("=")
    is_bare = key in ("run", "trained", "evals.third") and value and value[0] not in "\"'" and value != "null"
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if is_bare else argument


def main() -> int:
    sys.argv[1:] = map(as_path, sys.argv[1:])
    return entry_point.run_command(evaluate)


if __name__ == "__main__":
    sys.exit(main())
