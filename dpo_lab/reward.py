"""The command `python -m dpo_lab.reward [key=value ...]`: train a reward model on the pairs that DPO would see, and measure
it.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab.config import schema
from dpo_lab.pipelines.commands import REWARD


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name=REWARD.config_name)
def reward(cfg: DictConfig) -> float | None:
    return REWARD.start(cfg)


def main() -> int:
    return REWARD.main(reward)


if __name__ == "__main__":
    sys.exit(main())
