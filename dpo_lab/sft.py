"""The door of supervised fine-tuning: python -m dpo_lab.sft [key=value ...] makes the initial policy that train starts from."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="sft")
def sft(cfg: DictConfig) -> None:
    door.settle(cfg, _sft)


def _sft(settings: config.RunConfig) -> None:
    print("dpo_lab: initial policy", flush=True)  # before the seconds that torch takes to load
    from dpo_lab.run import make_initial_policy

    make_initial_policy(settings)


def main() -> int:
    return door.open_door(sft)


if __name__ == "__main__":
    sys.exit(main())
