"""The door of supervised fine-tuning: python -m dpo_lab.sft [key=value ...] makes a policy that train starts from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door
from dpo_lab.next_commands import after_sft, say_again

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="sft")
def sft(cfg: DictConfig) -> float | None:
    return door.settle(cfg, lambda settings: _sft(cfg, settings))


def _sft(cfg: DictConfig, settings: config.RunConfig) -> None:
    def run(folder: Path) -> None:
        with door.loading():
            from dpo_lab.sft_run import run_sft

        run_sft(cfg, settings, folder)

    def again(record: Mapping[str, Any], folder: Path) -> None:
        say_again(record, folder, after_sft(settings, record["overrides"], folder))

    record = config.sft_record(cfg, settings)
    door.enter("dpo_lab.sft", settings, record, run=run, again=again, alone=settings.is_embedded)


def main() -> int:
    return door.open_door(sft, config.sft_record)


if __name__ == "__main__":
    sys.exit(main())
