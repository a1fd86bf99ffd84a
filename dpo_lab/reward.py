"""The command `python -m dpo_lab.reward [key=value ...]`: train a reward model on the pairs that DPO would see, and measure
it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.cli.next_steps import after_reward, print_finished_run
from dpo_lab.config import reward_model, schema

schema.register()
reward_model.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="reward_model")
def reward(cfg: DictConfig) -> float | None:
    return entry_point.validate_and_run(cfg, lambda settings: _reward(cfg, settings))


def _reward(cfg: DictConfig, settings: schema.RunConfig) -> None:
    def run(folder: Path) -> None:
        with entry_point.fast_imports():
            from dpo_lab.pipelines.train_reward import train_reward

        train_reward(cfg, settings, folder)

    def if_done(record: Mapping[str, Any], folder: Path) -> None:
        print_finished_run(record, folder, after_reward(settings, record["overrides"], folder))

    entry_point.run_or_spawn_ranks(
        "dpo_lab.reward", settings, reward_model.reward_record(cfg, settings), run=run, if_done=if_done
    )


def main() -> int:
    return entry_point.run_command(reward, reward_model.reward_record)


if __name__ == "__main__":
    sys.exit(main())
