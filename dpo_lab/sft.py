"""The command `python -m dpo_lab.sft [key=value ...]`: supervised fine-tuning, which makes a policy that DPO starts
from.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab.config import schema
from dpo_lab.pipelines.commands import SFT


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name=SFT.config_name)
def sft(cfg: DictConfig) -> float | None:
    return SFT.start(cfg)


def main() -> int:
    return SFT.main(sft)


if __name__ == "__main__":
    sys.exit(main())
