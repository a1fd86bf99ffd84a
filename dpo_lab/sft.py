"""The door of supervised fine-tuning: python -m dpo_lab.sft [key=value ...] makes a policy that train starts from."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="sft")
def sft(cfg: DictConfig) -> float | None:
    return door.settle(cfg, lambda settings: _sft(cfg, settings))


def _sft(cfg: DictConfig, settings: config.RunConfig) -> None:
    folder = door.run_folder("dpo_lab.sft", cfg, settings)
    if folder is None:
        return
    print(f"dpo_lab: {'initial policy' if settings.is_embedded else folder}", flush=True)  # torch takes seconds to load
    from dpo_lab.sft_run import run_sft

    run_sft(cfg, settings, folder)


def main() -> int:
    return door.open_door(sft)


if __name__ == "__main__":
    sys.exit(main())
