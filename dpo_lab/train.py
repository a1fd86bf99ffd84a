"""The door of training: python -m dpo_lab.train [key=value ...] [--multirun] [--help]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_lab import config, door, sweep

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="train")
def train(cfg: DictConfig) -> None:
    door.settle(cfg, lambda settings: _train(cfg, settings))


def _train(cfg: DictConfig, settings: config.RunConfig) -> None:
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        sweep.run_cell()
        return
    if os.environ.get(sweep.CHILD) and "LOCAL_RANK" not in os.environ:
        sweep.die_with_parent()
    folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    print(f"dpo_lab: {folder}", flush=True)  # before the seconds that torch takes to load
    from dpo_lab.run import run

    run(cfg, settings, folder)


def main() -> int:
    return door.open_door(train)


if __name__ == "__main__":
    sys.exit(main())
