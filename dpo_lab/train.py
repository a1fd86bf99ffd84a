"""The command `python -m dpo_lab.train [key=value ...] [--multirun] [--help]`: train a policy by DPO and evaluate it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.cli.next_steps import after_training, print_finished_run
from dpo_lab.config import schema

schema.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="train")
def train(cfg: DictConfig) -> float | None:
    return entry_point.validate_and_run(cfg, lambda settings: _train(cfg, settings))


def _train(cfg: DictConfig, settings: schema.RunConfig) -> None:
    def run(folder: Path) -> None:
        with entry_point.fast_imports():
            from dpo_lab.pipelines.train_dpo import train_dpo

        train_dpo(cfg, settings, folder)

    def if_done(record: Mapping[str, Any], folder: Path) -> None:
        print_finished_run(record, folder, after_training(settings, record["overrides"], folder))

    entry_point.run_or_spawn_ranks("dpo_lab.train", settings, schema.as_record(cfg, settings), run=run, if_done=if_done)


def main() -> int:
    return entry_point.run_command(train)


if __name__ == "__main__":
    sys.exit(main())
