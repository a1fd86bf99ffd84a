"""The door of training: python -m dpo_lab.train [key=value ...] [--multirun] [--help]"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door
from dpo_lab.next_commands import after_training, say_again

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="train")
def train(cfg: DictConfig) -> float | None:
    return door.settle(cfg, lambda settings: _train(cfg, settings))


def _train(cfg: DictConfig, settings: config.RunConfig) -> None:
    def run(folder: Path) -> None:
        with door.loading():
            from dpo_lab.run import run

        run(cfg, settings, folder)

    def again(record: Mapping[str, Any], folder: Path) -> None:
        say_again(record, folder, after_training(settings, record["overrides"], folder))

    door.enter("dpo_lab.train", settings, config.as_record(cfg, settings), run=run, again=again)


def main() -> int:
    return door.open_door(train)


if __name__ == "__main__":
    sys.exit(main())
