"""The command `python -m dpo_lab.train [key=value ...] [--multirun] [--plan] [--help]`: train a policy by DPO and evaluate
it.
"""

from __future__ import annotations

import logging
import sys

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.config import schema
from dpo_lab.distributed.fork_server import fast_imports
from dpo_lab.pipelines.commands import TRAIN

PLAN = "--plan"


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name=TRAIN.config_name)
def train(cfg: DictConfig) -> float | None:
    return TRAIN.start(cfg)


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name=TRAIN.config_name)
def plan(cfg: DictConfig) -> None:
    entry_point.validate_and_run(cfg, _plan)


def _plan(settings: schema.RunConfig) -> None:
    with fast_imports():
        from dpo_lab.models.policy import PolicyError
        from dpo_lab.planning.report import print_plan
        from dpo_lab.terminal.progress import plain_console

    logging.captureWarnings(True)  # libraries' warnings
    try:
        print_plan(settings, plain_console())
    except PolicyError as error:
        raise schema.ConfigError(str(error)) from None


def main() -> int:
    if PLAN not in sys.argv:
        return TRAIN.main(train)
    if {"--multirun", "-m"} & {*sys.argv}:
        return entry_point.print_error(f"{PLAN}: plans one run; type it without --multirun", 2)
    sys.argv = [*(each for each in sys.argv if each != PLAN), "hydra.run.dir=."]  # no folder is made
    return entry_point.run_command(plan)


if __name__ == "__main__":
    sys.exit(main())
