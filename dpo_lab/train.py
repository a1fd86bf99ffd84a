"""The door of training: python -m dpo_lab.train [key=value ...] [--multirun] [--help]"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="train")
def train(cfg: DictConfig) -> float | None:
    return door.settle(cfg, lambda settings: _train(cfg, settings))


def _train(cfg: DictConfig, settings: config.RunConfig) -> None:
    folder = door.run_folder("dpo_lab.train", cfg, settings)
    if folder is None:
        return
    print(f"dpo_lab: {folder}", flush=True)  # before the seconds that torch takes to load
    from dpo_lab.run import run

    run(cfg, settings, folder)


def main() -> int:
    return door.open_door(train)


if __name__ == "__main__":
    sys.exit(main())
